"""Conversion from any format to any other, with a list of what was done to each tensor; nothing is overwritten.

The source's tensors are read one by one into one model, and leave it one by one: a conversion needs little more memory
than the model itself.
"""

import ctypes
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from hfgpt.configuration_hfgpt import HFGPTConfig
from hfgpt.data.vocabulary import check_rows, ids_of_text
from hfgpt.modeling_hfgpt import HFGPTForCausalLM
from hfgpt.system.machine import DTYPES
from hfgpt.system.storage import new_path
from hfgpt.weights import WRITERS, check_conversion
from hfgpt.weights.detect import read_any
from hfgpt.weights.formats import gguf, llmc, onnx
from hfgpt.weights.model_parts import (
    LanguageModel,
    SourceModel,
    Unsaid,
    build_from,
    check_architecture,
    check_single_dtype,
    split_model,
)
from hfgpt.weights.table import SAME_AS, Change
from hfgpt.weights.tokenizer import WITH_TOKENIZER, tokenizer_for, write_tokenizer

FORMATS = tuple(WRITERS)
"""Formats that can be read and written."""

ONLY_ACTIVATION = {
    "nanogpt": "gelu",
    **dict.fromkeys(("openai", "llms-from-scratch", "llm.c", "gguf"), "gelu_new"),
}
"""Format -> its activation, if it knows only one: the exact GELU, or GPT-2's, which approximates it by a tanh."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        source_format: what the source was found to be.
        steps_in: what was done to each tensor of the source.
        steps_between: what `nearest`, `vocab_size` and `dtype` changed, by hfgpt's names.
        steps_out: what was done to each tensor of the destination, by its name there.
        guesses: what the source does not say and was taken to be, see `SourceModel`.
        notes: what else a user should know.
        parameters: of the model.
        comparison: of the destination with the source, if it was asked for.
    """

    source_format: str
    steps_in: list[Change]
    steps_between: list[Change]
    steps_out: list[Change]
    guesses: list[str]
    notes: list[str]
    parameters: int
    comparison: check_conversion.Comparison | None

    @property
    def lossy(self) -> list[Change]:
        """The changes that filled, cut, dropped, rounded or exchanged something."""
        return [change for change in [*self.steps_in, *self.steps_between, *self.steps_out] if not change.is_exact]


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
    lora_alpha: float | None = None,
    vocab_size: int | None = None,
    tokenizer: str | None = None,
    nearest: bool = False,
) -> Conversion:
    """Write a model in another format.

    Args:
        source: file, folder or Hub id.
        dest: folder for "hfgpt", "gpt2", "nanochat" and "openai", file for the others; it must not exist.
        to: one of `FORMATS`, "gguf" or "onnx".
        source_format: one of `FORMATS`, or "auto" to find out.
        strict: whether to refuse a conversion that guesses, fills, cuts, drops, rounds or exchanges anything.
        verify: whether to run the source and the destination, and compare their logits.
        dtype: a key of `DTYPES`, None keeps the source's; for "gguf" a key of `gguf.QUANTIZATIONS`, fp32 if None.
        heads: attention heads, for sources that do not say it.
        activation: of the MLP, for sources that do not say it.
        lora_alpha: of LoRA layers, for sources that have such; they are merged.
        vocab_size: keep so many tokens and cut the rest, which is padding.
        tokenizer: folder, Hub id or nanoGPT's meta.pkl, to go along; None takes the one beside the source.
        nearest: whether to take the GELU that the destination knows, where it does not know the model's.

    Raises:
        ValueError: the source is damaged or of another kind, or the destination's format cannot hold the model.
        FileExistsError: the destination exists.
        FileNotFoundError: its folder does not exist.
    """
    dest = Path(dest)
    check_options(to, verify, dtype, tokenizer)
    with new_path(dest) as staged:  # first, so that a destination that exists is refused at once
        found, checkpoint = open_source(source, source_format, heads, activation, lora_alpha)
        check_architecture(checkpoint.config, to)
        model, steps_in = build_from(source, checkpoint)
        notes = [*checkpoint.notes]
        if verify and found == "llm.c":
            notes += check_debug_state(model, Path(source))
        goes_along, said = tokenizer_for(source, found, checkpoint, tokenizer, to)
        notes += said
        steps_between = exchange_activation(model.config, to) if nearest else []
        steps_between += cut_vocabulary(model, vocab_size)
        notes += check_tokenizer(goes_along, model.config.vocab_size, tokenizer or source)
        if to != "gguf":
            steps_between += change_dtype(model, dtype)
        parameters, config = model.num_parameters(), model.config
        parts = split_model(model)
        del model  # so that the writers can let each tensor go
        if to == "gguf":
            if goes_along is None:
                raise ValueError(f"GGUF holds the tokenizer too, and there is none in {source}. Give `--tokenizer`.")
            steps_out = gguf.write(parts, staged, goes_along, dtype or "fp32")
        elif to == "onnx":
            steps_out = onnx.write(parts, staged)
        else:
            steps_out = WRITERS[to](parts, staged)
            if goes_along is not None:
                notes += write_tokenizer(goes_along, staged, to, config.vocab_size)
        guesses = checkpoint.guesses
        result = Conversion(found, steps_in, steps_between, steps_out, guesses, notes, parameters, None)
        if strict and result.lossy:
            first = result.lossy[0]
            raise ValueError(
                f"--strict: {first.name} would be {first.action} ({len(result.lossy)} such tensors in all)."
            )
        if strict and guesses:
            raise ValueError(f"--strict: to be guessed: {' '.join(guesses)}")
    if not verify:
        return result
    is_exact = not steps_between and lora_alpha is None  # merging rounds
    comparison = check_conversion.compare(checkpoint.logits, found, dest, to, config, is_exact, is_guess=bool(guesses))
    return replace(result, comparison=comparison)


def give_freed_tensors_back() -> None:
    """Let glibc return every freed tensor to the system, for the rest of the process.

    After the first large ones it would keep what is below 32 MB in its heap, where holes between the tensors of a model
    add up: GPT-2 xl then takes 1.6 times its size instead of 1.1.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            m_mmap_threshold = -3  # in malloc.h
            mallopt(m_mmap_threshold, 2**20)


def check_options(to: str, verify: bool, dtype: str | None, tokenizer: str | None) -> None:
    """Check the options that do not depend on the source.

    Raises:
        ValueError: there is no such format or dtype, or the format cannot be verified or has no place for a tokenizer.
    """
    if to not in (*FORMATS, "gguf", "onnx"):
        raise ValueError(f"`--to` must be one of {sorted([*FORMATS, 'gguf', 'onnx'])}, got {to!r}.")
    if to == "gguf" and verify:
        raise ValueError("`--verify` cannot read GGUF again: llama.cpp does.")
    if tokenizer is not None and to not in WITH_TOKENIZER:
        raise ValueError(f"`--tokenizer` has no effect: {to} has no place for one, {', '.join(WITH_TOKENIZER)} have.")
    if to != "gguf" and dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`--dtype` must be one of {sorted(DTYPES)}, got {dtype!r}.")


def open_source(
    source: str | Path,
    source_format: str = "auto",
    heads: int | None = None,
    activation: str | None = None,
    lora_alpha: float | None = None,
) -> tuple[str, SourceModel]:
    """Find out what a source is, and read it; see `convert`.

    Raises:
        ValueError: it is damaged, of no known format, or of another one than asked for.
    """
    if source_format not in ("auto", *FORMATS):
        raise ValueError(f"`--from` must be 'auto' or one of {sorted(FORMATS)}, got {source_format!r}.")
    found, checkpoint = read_any(source, Unsaid(heads, activation, lora_alpha))
    if source_format not in ("auto", found):
        raise ValueError(f"{source} is not {source_format!r} but {found!r}.")
    return found, checkpoint


def exchange_activation(config: HFGPTConfig, to: str) -> list[Change]:
    """Take the GELU that the destination knows, in place, if the model's is the other one.

    They differ by at most 4.7e-4 per unit, which the layers above make more of or less.
    """
    needed = ONLY_ACTIVATION.get(to)
    if needed is None:
        return []
    has = config.activation_function
    if {SAME_AS.get(has, has), needed} != {"gelu", "gelu_new"}:
        return []
    config.activation_function = needed
    return [Change("activation_function", (), f"exchanged: {has} for {needed}", is_exact=False)]


def check_tokenizer(tokenizer: PreTrainedTokenizerFast | None, rows: int, source: str | Path) -> list[str]:
    """Refuse a tokenizer that makes ids of a text that the model has no row for.

    Returns:
        A note on tokens without a row that no text becomes, such as a pad token that was added to the tokenizer alone.

    Raises:
        ValueError: naming the largest id.
    """
    if tokenizer is None:
        return []
    check_rows(tokenizer, ids_of_text(tokenizer), rows, f"the tokenizer of {source}")
    beyond = [token for token, token_id in tokenizer.get_vocab().items() if token_id >= rows]
    if not beyond:
        return []
    note = f"no text becomes {', '.join(beyond)} of the tokenizer, for which the model has no row."
    return [f"{note} The pad token is {tokenizer.eos_token} instead." if tokenizer.pad_token in beyond else note]


def cut_vocabulary(model: LanguageModel, vocab_size: int | None) -> list[Change]:
    """Keep the first `vocab_size` tokens, in place.

    Raises:
        ValueError: there are not so many, or a token that the model names would be gone.
    """
    config = model.config
    if vocab_size in (None, config.vocab_size):
        return []
    if not 1 <= vocab_size <= config.vocab_size:
        raise ValueError(f"`--vocab-size` must be between 1 and the model's {config.vocab_size}, got {vocab_size}.")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(config, name)
        if max([ids] if isinstance(ids, int) else ids or [0]) >= vocab_size:
            raise ValueError(f"`--vocab-size` is {vocab_size}, and the model's `{name}` is {ids}.")
    matrices = [("model.embed_tokens.weight", model.model.embed_tokens.weight)]
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        matrices.append(("lm_head.weight", model.lm_head.weight))
    action = f"cut: {config.vocab_size - vocab_size} rows after the first {vocab_size}"
    changes = [Change(name, tuple(matrix.shape), action, is_exact=False) for name, matrix in matrices]
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    return changes


def change_dtype(model: LanguageModel, dtype: str | None) -> list[Change]:
    """Store every parameter as `dtype`, one at a time; only those whose numbers change are listed.

    Raises:
        ValueError: a number is beyond the dtype, or the file has several and none is chosen.
    """
    if dtype is None:
        check_single_dtype(model)
        return []
    changes = []
    for name, parameter in model.named_parameters():
        changed = parameter.detach().to(DTYPES[dtype])
        if not changed.isfinite().all():
            largest = float(parameter.detach().abs().max())
            raise ValueError(f"{name}: holds {largest:.3g}, and {dtype} ends at {torch.finfo(DTYPES[dtype]).max:.3g}.")
        if not torch.equal(changed.to(parameter.dtype), parameter.detach()):
            changes.append(Change(name, tuple(parameter.shape), f"rounded to {dtype}", is_exact=False))
        parameter.data = changed
    model.config.dtype = DTYPES[dtype]
    return changes


def check_debug_state(model: HFGPTForCausalLM, file: Path) -> list[str]:
    """Compare a model of llm.c with the logits, loss and gradients that llm.c has left beside it, if it has."""
    beside = llmc.debug_state_beside(file)
    if not beside.is_file():
        return []
    theirs = llmc.read_debug_state(beside, model.config)
    ours = llmc.make_debug_state(model, theirs.ids, theirs.targets)
    logits = float((ours.logits - theirs.logits).abs().max())
    # Beside the largest of all: that of the keys' biases is zero, since the softmax does not see them.
    largest = max(float(each.abs().max()) for each in theirs.gradients.values())
    gradient, name = max(
        (float((ours.gradients[name] - each).abs().max()) / largest, name) for name, each in theirs.gradients.items()
    )
    return [
        f"{beside.name}: max |Δlogit| {logits:.1e}, |Δloss| {abs(ours.loss - theirs.loss):.1e}, gradients within "
        f"{gradient:.1e} of the largest (most in {name})"
    ]


def render(result: Conversion) -> str:
    """The conversion as lines to read: each tensor in, each tensor out, and the sum of it."""
    parts = {"in:": result.steps_in, "changed:": result.steps_between, "out:": result.steps_out}
    width = max(len(change.name) for changes in parts.values() for change in changes)
    lines = []
    for title, changes in parts.items():
        rows = [
            f"  {change.name:<{width}}  {'x'.join(map(str, change.shape)):>12}  {change.action}" for change in changes
        ]
        lines += [title, *rows] if rows else []
    lines += [f"guessed: {guess}" for guess in result.guesses]
    lines += [f"note: {note}" for note in result.notes]
    if result.comparison is not None:
        lines.append(check_conversion.render(result.comparison))
    lost = len(result.lossy)
    losses = f"{lost} filled, cut, dropped, rounded or exchanged" if lost else "nothing lost"
    lines.append(
        f"{result.parameters:,} parameters from {len(result.steps_in)} tensors ({result.source_format}) to "
        f"{len(result.steps_out)}; {losses}"
    )
    return "\n".join(lines)
