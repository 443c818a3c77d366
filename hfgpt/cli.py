"""The command line: each command parses its words and hands them to one function of the library.

Results go to stdout, talk goes to stderr. Exit codes: 0 done, 1 fault, 2 misuse, 75 stopped by a signal and resumable,
130 stopped at once by Ctrl-C.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

ORDER_OF_THE_JOB = ("config", "tokenizer", "train", "evaluate", "generate", "verify", "convert")


class JobOrder(TyperGroup):
    """Lists the commands in the order of the job; typer itself puts those with subcommands last."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Put the names in order."""
        return sorted(super().list_commands(ctx), key=ORDER_OF_THE_JOB.index)


app = typer.Typer(
    name="hfgpt",
    cls=JobOrder,
    help="A GPT from scratch, in the Hugging Face ecosystem. The commands are in the order of the job.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tokenizer_app = typer.Typer(help="Train a tokenizer by itself.", no_args_is_help=True)

# What a user's words can cause; what else fails, a full disk or a run that diverged, is a fault.
MISUSES = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
Model = Annotated[str, typer.Argument(help="Folder or Hub id of an hfgpt or GPT-2 model.", metavar="MODEL")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values that differ from the recipe's.", metavar="[KEY.PATH=VALUE]...")
]
Recipe = Annotated[str, typer.Argument(help="A YAML file, or `demo`.", metavar="RECIPE")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Read what stands before the command."""


@app.command()
def config(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print a recipe with every value filled in."""
    from hfgpt.config import config_yaml, load_config
    from hfgpt.optim import check_optim

    loaded = load_config(recipe, overrides or [])
    check_optim(loaded.optim)
    print(config_yaml(loaded), end="")


@tokenizer_app.command("train")
def tokenizer_train(
    folder: Annotated[Path, typer.Argument(help="Folder to save the tokenizer in.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Such as `data.files=my.txt tokenizer.vocab_size=8000`.", metavar="[KEY.PATH=VALUE]..."),
    ] = None,
    recipe: Annotated[str, typer.Option(help="Recipe that names the text.")] = "demo",
) -> None:
    """Train a byte-level BPE tokenizer on the training split of a recipe's text."""
    from hfgpt.config import load_config
    from hfgpt.recorder import talk
    from hfgpt.run import train_run_tokenizer

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty. Name a new folder.")
    tokenizer = train_run_tokenizer(load_config(recipe, overrides or []))
    tokenizer.save_pretrained(folder)
    talk(f"{len(tokenizer):,} token ids in {folder}")


app.add_typer(tokenizer_app, name="tokenizer")


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[CHECKPOINT]",
            help="Go on from a checkpoint folder; without one from the newest, or from the start if there is none.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a model by a recipe, through the loop that it names."""
    from hfgpt.config import load_config

    loaded = load_config(recipe, overrides or [])  # before what takes seconds to import, so that a typo is told soon
    from hfgpt.recorder import talk
    from hfgpt.stopping import RESUMABLE, Stopped
    from hfgpt.train import train

    try:
        results = train(loaded, resume=resume or resume is not None)
    except Stopped as error:
        talk(str(error))
        raise typer.Exit(RESUMABLE) from None
    if results is None:
        talk(f"{loaded.output_dir} holds this run, finished.")
        results = json.loads((Path(loaded.output_dir) / "results.json").read_text(encoding="utf-8"))
    if as_json and results:
        print_json(results)
    elif results:
        talk(
            f"{loaded.output_dir}: validation perplexity {results['val_perplexity']:.1f}; of the same tokens, a bigram "
            f"model's is {results['bigram_perplexity']:.1f}, a unigram model's {results['unigram_perplexity']:.1f}"
        )


@app.command()
def evaluate(
    model: Model,
    data: Annotated[list[str], typer.Option(help="File or folder of text; may be given more than once.")],
    text_column: Annotated[str, typer.Option(help="Column of the text in .jsonl, .csv and .parquet.")] = "text",
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in one forward pass.")] = 8,
    as_json: Json = False,
) -> None:
    """Measure loss and perplexity of a model on a text."""
    from hfgpt.evaluation import evaluate_files

    score = evaluate_files(model, data, text_column, batch_size)
    result = {"loss": score.loss, "perplexity": score.perplexity, "tokens": score.tokens}
    if as_json:
        print_json(result)
    else:
        print(f"loss        {score.loss:.4f} nats/token")
        print(f"perplexity  {score.perplexity:.2f}")
        print(f"tokens      {score.tokens:,} scored, in windows of the model's context")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to write on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 100,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Likeliest tokens to draw from; 0 draws from all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Probability of the likeliest tokens to draw from.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Fixes the text.")] = None,
    as_json: Json = False,
) -> None:
    """Write on from a prompt, token by token."""
    from hfgpt.generation import continue_text

    pieces = continue_text(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    if as_json:
        print_json({"prompt": prompt, "text": prompt + "".join(pieces)})
        return
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


@app.command()
def verify(
    source: Annotated[str | None, typer.Argument(help="Folder or Hub id of a GPT-2 or hfgpt model.")] = None,
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
    from hfgpt.recorder import talk
    from hfgpt.weights.verify import SIZES, memory_needed, render, verify, verify_random

    if random is None:
        assert source is not None
        result = verify(source, bf16)
    else:
        talk(f"needs about {memory_needed(random, layers) / 1e9:.1f} GB of memory")
        if layers is not None:
            talk(f"at reduced depth: {layers} of the {SIZES[random]['n_layer']} blocks of {random}")
        result = verify_random(random, layers, bf16=bf16)
    if as_json:
        print_json(asdict(result))
    else:
        print(render(result))
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="File, folder or Hub id.")],
    dest: Annotated[Path, typer.Argument(help="New folder (hfgpt, gpt2, openai) or file (the others).")],
    to: Annotated[str, typer.Option(help="hfgpt, gpt2, openai, nanogpt, llms-from-scratch, llm.c, gguf or onnx.")],
    source_format: Annotated[str, typer.Option("--from", help="One of the first six, or auto: find out.")] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="Refuse to fill, cut, drop or round anything.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Run both, each its own way; compare the logits.")] = False,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16, for gguf q8_0; else the source's.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads, if the file does not say it.")] = None,
    activation: Annotated[str | None, typer.Option(help="The MLP's, if the file does not say it.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Cut the padding after so many tokens.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder, Hub id or meta.pkl, to go along.")] = None,
    as_json: Json = False,
) -> None:
    """Write a model in another format, and say what was done to each tensor."""
    from hfgpt.weights.convert import convert, give_freed_tensors_back, render

    give_freed_tensors_back()
    result = convert(source, dest, to, source_format, strict, verify, dtype, heads, activation, vocab_size, tokenizer)
    if as_json:
        print_json(asdict(result))
    else:
        print(render(result))
    if result.comparison is not None and not result.comparison.passed:
        raise typer.Exit(1)


def print_json(result: dict[str, Any]) -> None:
    """Print one object on one line, as programs read it."""
    print(json.dumps(result, ensure_ascii=False))


def main() -> None:
    """Run the command line; a user's mistake gets one line and exit code 2, without a traceback."""
    is_debug = "--debug" in sys.argv
    # Every command knows --debug, wherever it stands.
    sys.argv = [sys.argv[0], *join_resume([word for word in sys.argv[1:] if word != "--debug"])]
    quieten_libraries()
    try:
        check_encoding(sys.argv)
        app()
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint is as it was.", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, FloatingPointError) as error:
        if is_debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, MISUSES) else 1) from None


def check_encoding(words: list[str]) -> None:
    """Refuse words that are no text: Python hands bytes that it cannot decode on as lone surrogates.

    Raises:
        ValueError: naming the word.
    """
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise ValueError(f"{word!r} is not UTF-8. Set the terminal to UTF-8.")


def join_resume(words: list[str]) -> list[str]:
    """Write `--resume` and `--resume PATH` as one word each, since typer has no options whose value may be left out.

    What follows is a path if it comes after the recipe and is neither an option nor a `key=value`.
    """
    result: list[str] = []
    for word in words:
        has_recipe = len([earlier for earlier in result if not earlier.startswith("-")]) > 1  # after the command
        is_path = not word.startswith("-") and "=" not in word and result[-1:] == ["--resume="]
        if is_path and has_recipe:
            result[-1] += word
        else:
            result.append("--resume=" if word == "--resume" else word)
    return result


def quieten_libraries() -> None:
    """Leave the terminal to hfgpt: transformers' bars and hints, and, where nobody watches, those of datasets.

    By environment variables, because importing the libraries takes seconds that `--help` does not need.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    main()
