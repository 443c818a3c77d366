"""Weights of other formats, in and out. One file per format, with one table each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from hfgpt.modeling_hfgpt import HFGPTForCausalLM
from hfgpt.weights import gpt2
from hfgpt.weights.gpt2 import to_gpt2

__all__ = ["WRITERS", "load", "save", "to_gpt2"]


def save_hfgpt(model: HFGPTForCausalLM, folder: str | Path) -> None:
    """Save in hfgpt's own layout, with the code that runs it."""
    model.save_pretrained(folder)


WRITERS: dict[str, Callable[[HFGPTForCausalLM, str | Path], None]] = {"hfgpt": save_hfgpt, "gpt2": gpt2.save}
"""Format -> what writes a model into a folder."""


def load(source: str | Path, dtype: torch.dtype | str = "auto", **config: Any) -> HFGPTForCausalLM:
    """Load an hfgpt or GPT-2 model, in eval mode.

    Args:
        source: folder or Hub id.
        dtype: of the weights in memory; "auto" keeps that of the file.
        **config: fields of the config that shall differ, such as `resid_pdrop`.

    Raises:
        ValueError: there is no such model, it is of another kind or damaged, or its weights do not fit its config.
    """
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ValueError(f"{source} is no model folder: it has no config.json.")
    try:
        return HFGPTForCausalLM.from_pretrained(source, dtype=dtype, **config)
    except (OSError, SafetensorError, StrictDataclassError) as error:
        # What transformers explains in paragraphs becomes one line.
        raise ValueError(f"no model {str(source)!r}: {' '.join(str(error).split())}") from error


def save(model: HFGPTForCausalLM, folder: str | Path, format: str = "hfgpt") -> None:
    """Write a model into a folder.

    Args:
        model: any hfgpt model with a language-modelling head.
        folder: made if it is not there.
        format: a key of `WRITERS`.

    Raises:
        ValueError: there is no such format.
    """
    if format not in WRITERS:
        raise ValueError(f"`format` must be one of {sorted(WRITERS)}, got {format!r}.")
    WRITERS[format](model, folder)
