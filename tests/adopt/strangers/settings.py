"""A config object with attributes, nested, and a class that only some other file would define."""

import torch
from torch import nn


class TinyGPT(nn.Module):
    def __init__(self, hparams, vocab):
        super().__init__()
        self.emb = nn.Embedding(vocab, hparams.model.width)
        self.pos = nn.Parameter(torch.zeros(1, hparams.model.length, hparams.model.width))
        self.mix = nn.Linear(hparams.model.width, hparams.model.width)
        self.head = nn.Linear(hparams.model.width, vocab)

    def forward(self, x):
        T = x.shape[1]
        h = self.emb(x) + self.pos[:, :T]
        weights = torch.ones(T, T, device=x.device).tril()
        h = h + self.mix(weights / weights.sum(-1, keepdim=True) @ h)
        return {"logits": self.head(h), "hidden": h}
