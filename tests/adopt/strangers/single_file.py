"""A licence of somebody's."""

import math
from dataclasses import dataclass, asdict

import not_installed_anywhere
import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class ModelConfig:
    block_size: int = 64
    vocab_size: int = 300
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 64
    bias: bool = True
    betas: tuple = (0.9, 0.95)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        mask = torch.tril(torch.ones(config.block_size, config.block_size))
        self.register_buffer("mask", mask.view(1, 1, config.block_size, config.block_size))
        self.n_head = config.n_head

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (each.view(B, T, self.n_head, -1).transpose(1, 2) for each in self.qkv(self.ln(x)).split(C, dim=2))
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.shape[-1])
        scores = scores.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
        y = F.softmax(scores, dim=-1) @ v
        return x + self.proj(y.transpose(1, 2).reshape(B, T, C))


class GPT(nn.Module):
    """Scores the last position only, unless there are targets."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        self.apply(self._init)

    def _init(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, idx, targets=None):
        T = idx.shape[1]
        assert T <= self.config.block_size, f"{T} tokens are too many"
        x = self.wte(idx) + self.wpe(torch.arange(T, device=idx.device))
        for block in self.h:
            x = block(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)

    def crop(self, text):
        return not_installed_anywhere.encode(text)


class Annotated(GPT):
    def __init__(self, config: ModelConfig):
        super().__init__(config)


if __name__ == "__main__":
    print(asdict(ModelConfig()))
