"""From any format to any other, with word of what was done to each tensor; nothing is overwritten."""

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from hfgpt.configuration_hfgpt import GPT2_SOURCE, HFGPTConfig
from hfgpt.modeling_hfgpt import HFGPTForCausalLM
from hfgpt.permissions import make_readable
from hfgpt.tokenizer import load_tokenizer
from hfgpt.weights import OTHER_WRITERS, WRITERS, gguf_file, gpt2, load, onnx_file, openai
from hfgpt.weights.files import is_foreign, read_foreign, refuse_settings
from hfgpt.weights.tables import Step, build_from, own_tensors, walk_out

FORMATS = (*WRITERS, *OTHER_WRITERS)

"""What can be read, and written too."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Comparison:
    """What the destination says, beside what the source said, on the same random tokens in fp32.

    Attributes:
        by: what ran the destination: transformers' own GPT-2, onnxruntime, or hfgpt after reading it again.
        max_abs_diff: largest |Δlogit|.
        kl: mean divergence of the next-token distributions, in nats.
        argmax_agreement: share of positions with the same likeliest token, in [0, 1].
    """

    by: str
    max_abs_diff: float
    kl: float
    argmax_agreement: float


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        source_format: what the source was found to be.
        steps_in: what was done to each tensor of the source.
        steps_out: what was done to each tensor of the destination, by its name there.
        notes: what else a user should know.
        parameters: of the model.
        comparison: of the destination with the source, if it was asked for.
    """

    source_format: str
    steps_in: list[Step]
    steps_out: list[Step]
    notes: list[str]
    parameters: int
    comparison: Comparison | None


def convert(
    source: str | Path,
    dest: str | Path,
    to: str,
    source_format: str = "auto",
    strict: bool = False,
    verify: bool = False,
    dtype: str | None = None,
    heads: int | None = None,
    activation: str | None = None,
) -> Conversion:
    """Write a model in another format.

    Args:
        source: file, folder or Hub id. The tokenizer in a folder goes along into a folder of transformers.
        dest: folder for "hfgpt", "gpt2" and "openai", file for the others; it must not exist.
        to: one of `FORMATS`, "gguf" or "onnx".
        source_format: one of `FORMATS`, or "auto" to find out.
        strict: whether to refuse a conversion that fills, cuts or drops anything.
        verify: whether to read the destination again and compare its logits.
        dtype: a key of `DTYPES`, None keeps the source's; for "gguf" a key of `gguf_file.QUANTIZATIONS`, fp32 if None.
        heads: attention heads, for sources that do not say it.
        activation: of the MLP, for sources that do not say it.

    Raises:
        ValueError: the source is damaged or of another kind, or the destination's format cannot hold the model.
        FileExistsError: the destination exists.
        FileNotFoundError: its folder does not exist.
    """
    dest = Path(dest)
    if to not in (*FORMATS, "gguf", "onnx"):
        raise ValueError(f"`--to` must be one of {sorted([*FORMATS, 'gguf', 'onnx'])}, got {to!r}.")
    if to == "gguf" and verify:
        raise ValueError("`--verify` cannot read GGUF again: llama.cpp does.")
    if to != "gguf" and dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`--dtype` must be one of {sorted(DTYPES)}, got {dtype!r}.")
    if dest.exists():
        raise FileExistsError(f"{dest} exists. Name a new one.")
    if not dest.absolute().parent.is_dir():
        raise FileNotFoundError(f"{dest.absolute().parent} is no folder. Make it first.")

    model, found, steps_in, notes = read(source, source_format, heads, activation)
    if to != "gguf" and dtype is not None:
        model = model.to(DTYPES[dtype])
    refuse_losses(steps_in, strict)
    with tempfile.TemporaryDirectory(dir=dest.absolute().parent, prefix=f".{dest.name}.") as folder:
        staged = Path(folder) / dest.name
        if to in WRITERS:
            WRITERS[to](model, staged)
            tokenizer = tokenizer_of(Path(source))
            if tokenizer is not None:
                tokenizer.save_pretrained(staged)
            steps_out = steps_of(model, to)
        elif to == "gguf":
            tokenizer = tokenizer_of(Path(source))
            if tokenizer is None:
                raise ValueError(f"GGUF holds the tokenizer too, and there is none in {source}.")
            steps_out = gguf_file.write(model, staged, tokenizer, dtype or "fp32")
        elif to == "onnx":
            steps_out = onnx_file.write(model, staged)
        else:
            steps_out = OTHER_WRITERS[to](model, staged)
        refuse_losses(steps_out, strict)
        make_readable(staged)
        os.rename(staged, dest)
    comparison = compare(model, dest, to) if verify else None
    return Conversion(found, steps_in, steps_out, notes, model.num_parameters(), comparison)


def tokenizer_of(source: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer that lies beside the weights of a folder, if there is one."""
    if openai.recognises(source):
        return openai.read_tokenizer(source)
    return load_tokenizer(str(source)) if (source / "tokenizer.json").is_file() else None


@torch.no_grad()
def compare(model: HFGPTForCausalLM, dest: Path, to: str) -> Comparison:
    """Run what was written beside what it was written from."""
    length = min(256, model.config.max_position_embeddings)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    if to == "onnx":
        theirs, by = onnx_file.run(dest, ids), "onnxruntime"
    elif to == "gpt2":
        theirs, by = GPT2LMHeadModel.from_pretrained(dest).float().eval()(ids).logits, "transformers' GPT-2"
    else:
        says_no_heads = to == "llms-from-scratch"
        written = load(dest, heads=model.config.num_attention_heads if says_no_heads else None)
        theirs, by = written.float().eval()(ids).logits, "hfgpt, which read it again"
    ours = model.float().eval()(ids).logits
    log_ours, log_theirs = ours.log_softmax(dim=-1), theirs.log_softmax(dim=-1)
    return Comparison(
        by=by,
        max_abs_diff=float((ours - theirs).abs().max()),
        kl=float((log_ours.exp() * (log_ours - log_theirs)).sum(dim=-1).mean()),
        argmax_agreement=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    )


def refuse_losses(steps: list[Step], strict: bool) -> None:
    lossy = [step for step in steps if not step.is_exact]
    if strict and lossy:
        raise ValueError(f"--strict: {lossy[0].name} would be {lossy[0].action} ({len(lossy)} such tensors in all).")


def read(
    source: str | Path, source_format: str = "auto", heads: int | None = None, activation: str | None = None
) -> tuple[HFGPTForCausalLM, str, list[Step], list[str]]:
    """Load a model of any format.

    Args:
        source: file, folder or Hub id.
        source_format: see `convert`, as for the others.
        heads: see there.
        activation: see there.

    Returns:
        The model in eval mode, its format, what was done to each tensor, and notes.

    Raises:
        ValueError: see `convert`.
    """
    if source_format not in ("auto", *FORMATS):
        raise ValueError(f"`--from` must be 'auto' or one of {sorted(FORMATS)}, got {source_format!r}.")
    if is_foreign(Path(source)):
        found, checkpoint = read_foreign(Path(source), heads, activation)
        model, steps = build_from(source, checkpoint)
        notes = checkpoint.notes
    else:
        refuse_settings("a folder's config does", heads, activation)
        model = load(source)
        found = "gpt2" if HFGPTConfig.from_pretrained(source).model_type == GPT2_SOURCE else "hfgpt"
        steps, notes = steps_of(model, found) + dropped_masks(Path(source)), []
    if source_format not in ("auto", found):
        raise ValueError(f"{source} is not {source_format!r} but {found!r}.")
    return model, found, steps, notes


def steps_of(model: HFGPTForCausalLM, folder_format: str) -> list[Step]:
    """What reading or writing a folder of transformers does to each tensor."""
    tensors = own_tensors(model)
    if folder_format == "hfgpt":
        return [Step(name, tuple(tensor.shape), "copied") for name, tensor in tensors.items()]
    table = gpt2.entries(model.config.num_hidden_layers, tied="lm_head.weight" not in tensors)
    return walk_out(table, {name: tensor.to("meta") for name, tensor in tensors.items()})[1]


def dropped_masks(folder: Path) -> list[Step]:
    """The causal masks that old GPT-2 files hold, and that transformers leaves out as it reads them."""
    steps = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            for name in content.keys():
                if re.search(r"\.attn\.(masked_)?bias$", name):
                    steps.append(Step(name, tuple(content.get_slice(name).get_shape()), "dropped", is_exact=False))
    return steps


def render(result: Conversion) -> str:
    """The conversion as lines to read: each tensor in, each tensor out, and the sum of it."""
    width = max(len(step.name) for step in [*result.steps_in, *result.steps_out])

    def lines(steps: list[Step]) -> list[str]:
        return [f"  {step.name:<{width}}  {'x'.join(map(str, step.shape)):>12}  {step.action}" for step in steps]

    lossy = [step for step in [*result.steps_in, *result.steps_out] if not step.is_exact]
    summary = (
        f"{result.parameters:,} parameters from {len(result.steps_in)} tensors ({result.source_format}) to "
        f"{len(result.steps_out)}; "
        + (f"{len(lossy)} filled, cut or dropped" if lossy else "nothing filled, cut or dropped")
    )
    notes = [f"note: {note}" for note in result.notes]
    if result.comparison is not None:
        found = result.comparison
        notes.append(
            f"verified: {found.by}, gives logits within {found.max_abs_diff:.2e} of the source's, KL {found.kl:.1e} "
            f"nats, the same likeliest token at {found.argmax_agreement:.2%} of the positions"
        )
    return "\n".join(["in:", *lines(result.steps_in), "out:", *lines(result.steps_out), *notes, summary])
