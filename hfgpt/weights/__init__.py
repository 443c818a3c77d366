"""Weights of other formats, in and out. One file per format, with one table each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import NanoChatConfig

from hfgpt.configuration_hfgpt import canonical_fields, unknown_field_message
from hfgpt.system.console import print_status
from hfgpt.system.storage import new_path
from hfgpt.weights.detect import read_any
from hfgpt.weights.formats import gpt2, hf_folder, llmc, llms_from_scratch, nanogpt, openai
from hfgpt.weights.formats.gpt2 import to_gpt2
from hfgpt.weights.model_parts import (
    LanguageModel,
    ModelParts,
    Unsaid,
    build_from,
    check_architecture,
    check_single_dtype,
    split_model,
)
from hfgpt.weights.table import Change

__all__ = ["WRITERS", "load", "save", "to_gpt2"]

WRITERS: dict[str, Callable[[ModelParts, Path], list[Change]]] = {
    "hfgpt": hf_folder.write,
    "gpt2": gpt2.write,
    "nanochat": hf_folder.write,
    "nanogpt": nanogpt.write,
    "llms-from-scratch": llms_from_scratch.write,
    "llm.c": llmc.write,
    "openai": openai.write,
}
"""Format -> what writes a model's parts, which are used up, and says what it did to each tensor. A new file, or for
"hfgpt", "gpt2", "nanochat" and "openai" a new folder. All but "nanochat" hold the network of GPT-2."""


def load(
    source: str | Path,
    dtype: torch.dtype | None = None,
    heads: int | None = None,
    activation: str | None = None,
    lora_alpha: float | None = None,
    **config: Any,
) -> LanguageModel:
    """Load a model of any format that hfgpt reads, in eval mode.

    Args:
        source: folder or Hub id of an hfgpt, GPT-2 or nanochat model; folder of OpenAI's original GPT-2; file of
            nanoGPT, minGPT, build-nanogpt, LLMs-from-scratch or llm.c.
        dtype: of the weights in memory; None keeps that of the file.
        heads: number of attention heads, for a file that does not say it; what is guessed instead is printed.
        activation: the MLP's, for a file that does not say it; what is guessed instead is printed.
        lora_alpha: of LoRA layers, which their file does not say; they are merged.
        **config: fields of its config that shall differ, such as `resid_pdrop`.

    Raises:
        ValueError: there is no such model, it is of another kind or damaged, its weights do not fit its config, or they
            are of several types and none is chosen.
    """
    _, checkpoint = read_any(source, Unsaid(heads, activation, lora_alpha))
    for guess in checkpoint.guesses:
        print_status(f"{source}: guessed: {guess}")
    for name, value in canonical_fields(config).items():
        if name not in type(checkpoint.config).__dataclass_fields__:
            is_nanochat = isinstance(checkpoint.config, NanoChatConfig)
            raise ValueError(f"nanochat has no `{name}`." if is_nanochat else unknown_field_message(name))
        setattr(checkpoint.config, name, value)
    checkpoint.config.validate_architecture()
    model, _ = build_from(source, checkpoint)
    if dtype is None:
        check_single_dtype(model)
        return model
    return model.to(dtype)


def save(model: LanguageModel, dest: str | Path, format: str = "hfgpt") -> None:
    """Write a model in any format.

    Args:
        model: any hfgpt model with a language-modelling head.
        dest: of the new folder, for "hfgpt", "gpt2", "nanochat" and "openai", or of the new file for the others.
        format: a key of `WRITERS`.

    Raises:
        ValueError: there is no such format, or it cannot hold this model.
        FileExistsError: the destination exists.
        FileNotFoundError: its folder does not exist.
    """
    if format not in WRITERS:
        raise ValueError(f"`format` must be one of {sorted(WRITERS)}, got {format!r}.")
    check_architecture(model.config, format)
    with new_path(Path(dest)) as staged:
        WRITERS[format](split_model(model), staged)
