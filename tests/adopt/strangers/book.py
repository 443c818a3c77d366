"""A dictionary of sizes; logits alone come back."""

import torch
import torch.nn as nn
from neighbour import FeedForward

import neighbour as parts


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.attention = nn.MultiheadAttention(cfg["emb_dim"], cfg["n_heads"], cfg["drop_rate"], batch_first=True)
        self.ff = FeedForward(cfg)
        self.norm = parts.Norm(cfg["emb_dim"])

    def forward(self, x):
        T = x.shape[1]
        hidden = torch.triu(torch.ones(T, T, dtype=torch.bool, device=x.device), diagonal=1)
        y = self.norm(x)
        x = x + self.attention(y, y, y, attn_mask=hidden, need_weights=False)[0]
        return x + self.ff(x)


class GPTModel(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.trf_blocks = nn.Sequential(*[Block(cfg) for _ in range(cfg["n_layers"])])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=cfg.get("head_bias", False))

    def forward(self, in_idx):
        x = self.tok_emb(in_idx) + self.pos_emb(torch.arange(in_idx.shape[1], device=in_idx.device))
        return self.out_head(self.trf_blocks(x))
