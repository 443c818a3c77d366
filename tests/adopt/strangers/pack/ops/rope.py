import torch

BASE = 10000.0


def rotary_table(length, width):
    angles = torch.outer(torch.arange(length).float(), BASE ** (-torch.arange(0, width, 2) / width))
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
