from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import layers
from .ops.rope import *


class Output(NamedTuple):
    loss: torch.Tensor | None
    logits: torch.Tensor


class Decoder(nn.Module):
    """Keywords; rotary positions in a table that is not saved; the embedding is the head, by F.linear."""

    def __init__(self, n_vocab: int, dim: int = 16, depth: int = 2, *, heads: int = 2, dtype: str = "float32"):
        super().__init__()
        assert dtype == "float32"
        self.emb = nn.Embedding(n_vocab, dim)
        self.layers = nn.ModuleList([layers.Layer(dim, heads) for _ in range(depth)])
        cos, sin = rotary_table(32, dim // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens, labels=None):
        x = self.emb(tokens)
        T = tokens.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:T], self.sin[:T])
        logits = F.linear(x, self.emb.weight)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Output(loss, logits)
