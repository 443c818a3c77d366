"""What the formats' own forward passes have in common; each is written from its project's code, in its format's module.

They know nothing of hfgpt's tables, names and modules: that is what makes them a judge of those.

Activations are transformers' `ACT2FN`.

Shape letters: B texts, T tokens, H heads, C width.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hfgpt.weights.lazy_tensors import LazyTensor, read

EPSILON = 1e-5  # in every LayerNorm of every format here


def reader(tensors: Mapping[str, LazyTensor | Tensor], dtype: torch.dtype) -> Callable[[str], Tensor]:
    """A function that reads a tensor by its name, as `dtype`."""
    return lambda name: read(tensors[name]).to(dtype)


def attend(q_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, heads: int) -> Tensor:
    """Causal attention, spelled out: each position looks at itself and those before it."""
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q_BTC, k_BTC, v_BTC))  # (B, H, T, C / H)
    scores_BHTT = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    future_TT = torch.ones(scores_BHTT.shape[-2:], dtype=torch.bool).triu(1)
    return (scores_BHTT.masked_fill(future_TT, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


def norm(x_BTC: Tensor, gain_C: Tensor, shift_C: Tensor | None) -> Tensor:
    """LayerNorm; without a shift where the format has none."""
    return F.layer_norm(x_BTC, gain_C.shape, gain_C, shift_C, EPSILON)
