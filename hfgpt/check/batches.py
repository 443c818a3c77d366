"""Batches that promises are tried on, and what a model's forward pass takes.

Shape letters: B batch, T positions.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from hfgpt.arguments import CACHE
from hfgpt.check.subject import Subject

LENGTHS = (12, 9, 5)
"""Tokens in the rows of a batch of texts of different length."""


def pad(ids: Tensor, side: str, lengths: tuple[int, ...] = LENGTHS, filler: int = 0) -> tuple[Tensor, Tensor]:
    """Keep the first `lengths` ids of each row and put padding to one side of them: ids and mask, both (B, T)."""
    padded, mask = torch.full_like(ids, filler), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        kept = slice(0, length) if side == "right" else slice(ids.shape[1] - length, None)
        padded[row, kept], mask[row, kept] = ids[row, :length], 1
    return padded, mask


def count_positions(mask: Tensor) -> Tensor:
    """Positions from 0 that leave padding out, (B, T)."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def takes(model: Any, name: str) -> bool:
    """Whether the forward pass of a model, or of a class, names an argument, or takes any."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())


def cache_argument(model: Any) -> str:
    """What the forward pass of a model calls its cache; transformers' name if it takes any argument."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in (CACHE, "past_key_values", "cache") if name in parameters), CACHE)


def keeps_cache(subject: Subject) -> bool:
    """Whether the class names a cache among its arguments, or returns one when asked to."""
    if cache_argument(subject.model_class) in inspect.signature(subject.model_class.forward).parameters:
        return True
    if not takes(subject.model_class, "use_cache"):
        return False
    with torch.no_grad():
        return cache_of(subject.make()(subject.ids(1, 5), use_cache=True)) is not None


def cache_of(output: Any) -> Any:
    """The cache in an output; None if there is none."""
    return next((output[name] for name in (CACHE, "past_key_values", "cache") if output.get(name) is not None), None)


def can_generate(subject: Subject) -> bool:
    """Whether the class has `generate`."""
    return hasattr(subject.model_class, "generate")


def input_embeddings(model: Any) -> Any:
    """The layer that embeds the ids; None where the class names none, which transformers says by an error."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


@torch.no_grad()
def logits(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    """The logits of one pass, (B, T, V)."""
    return model(ids, **arguments).logits
