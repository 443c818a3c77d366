"""Commands about weights: are they GPT-2, and in which format."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hfgpt.cli.app import Json, app, busy, print_json, print_result


@app.command()
def verify(
    source: Annotated[
        str | None, typer.Argument(help="Folder or Hub id of a GPT-2 or hfgpt model.", metavar="MODEL")
    ] = None,
    random: Annotated[str | None, typer.Option(help="Random weights: small, medium, large or xl.")] = None,
    layers: Annotated[int | None, typer.Option(help="With --random: compare so many blocks only.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compare in bf16 as well (slow on most CPUs).")] = False,
    as_json: Json = False,
) -> None:
    """Compare a model with transformers' GPT-2 on the same weights."""
    if (source is None) == (random is None):
        raise ValueError("give a model or `--random SIZE`, one of them.")
    if layers is not None and random is None:
        raise ValueError("`--layers` has no effect without `--random`.")
    from hfgpt.evaluation.verify_gpt2 import SIZES, memory_needed, render, verify, verify_random
    from hfgpt.system.console import print_status

    if random is None:
        assert source is not None
        with busy(f"comparing {source} with GPT-2", source):
            result = verify(source, bf16)
    else:
        print_status(f"needs about {memory_needed(random, layers) / 1e9:.1f} GB of memory")
        if layers is not None:
            print_status(f"at reduced depth: {layers} of the {SIZES[random]['n_layer']} blocks of {random}")
        with busy("comparing on random weights"):
            result = verify_random(random, layers, bf16=bf16)
    if as_json:
        print_json(asdict(result))
    else:
        print_result(render(result))
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="File, folder or Hub id.", metavar="SOURCE")],
    dest: Annotated[Path, typer.Argument(help="New folder (hfgpt, gpt2, nanochat, openai) or file.", metavar="NEW")],
    to: Annotated[
        str, typer.Option(help="hfgpt, gpt2, openai, nanogpt, llms-from-scratch, llm.c, nanochat, gguf, onnx.")
    ],
    source_format: Annotated[str, typer.Option("--from", help="One of the first seven, or auto: find out.")] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="Refuse whatever loses or changes anything.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Run both, each its own way; compare the logits.")] = False,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16, for gguf q8_0; else the source's.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads, if the file does not say it.")] = None,
    activation: Annotated[str | None, typer.Option(help="The MLP's, if the file does not say it.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Of LoRA layers in the file, to merge them.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Cut the padding after so many tokens.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder, Hub id or meta.pkl, to go along.")] = None,
    nearest: Annotated[bool, typer.Option("--nearest", help="Take the GELU that the format knows.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model in another format, and say what was done to each tensor."""
    from hfgpt.weights.convert import convert, give_freed_tensors_back, render

    give_freed_tensors_back()
    with busy(f"converting {source}", source):
        result = convert(
            source,
            dest,
            to,
            source_format=source_format,
            strict=strict,
            verify=verify,
            dtype=dtype,
            heads=heads,
            activation=activation,
            lora_alpha=lora_alpha,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            nearest=nearest,
        )
    if as_json:
        print_json(asdict(result))
    else:
        print_result(render(result))
    if result.comparison is not None and not result.comparison.passed:
        raise typer.Exit(1)
