"""How fast a machine multiplies matrices, and how many operations a token costs: what a run's speed is measured by."""

import time
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SECONDS, PRODUCTS, MOST_SECONDS = 0.1, 20, 1.0
"""How long and how often to measure at least, and how long at most. The fastest product counts."""


def training_flops_per_token(model: PreTrainedModel, block_size: int) -> int:
    """Operations of the matrix products in one forward and backward pass, for each token: 6 N + 12 L C T.

    N counts the weights of the linear layers: the output layer, though it may be the embedding, and neither positions
    nor norms, which multiply no matrix. Attention counts as if every token saw all T of its row; what recomputing
    costs does not count.

    Args:
        model: with `config.num_hidden_layers` (L) and `config.hidden_size` (C).
        block_size: tokens in a row, T.

    Source:
        Chowdhery et al. 2022, "PaLM: Scaling Language Modeling with Pathways", appendix B,
        https://arxiv.org/abs/2204.02311
    """
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return 6 * weights + 12 * model.config.num_hidden_layers * model.config.hidden_size * block_size


@cache
def matmul_peak(device: torch.device, precision: str) -> float:
    """Operations per second of the fastest of some large matrix products, measured now and on this machine.

    Draws from a generator of its own. A process measures once.

    Args:
        device: to multiply on.
        precision: `fp32`, `bf16` or `fp16`.
    """
    size = 512 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)
    first, second = (
        torch.randn(size, size, generator=generator, device=device).to(DTYPES[precision]) for _ in range(2)
    )
    product = torch.empty_like(first)
    multiply(first, second, product)  # the first one also loads and chooses kernels
    taken = [multiply(first, second, product)]
    while sum(taken) < SECONDS or (len(taken) < PRODUCTS and sum(taken) < MOST_SECONDS):
        taken.append(multiply(first, second, product))
    del first, second, product
    if device.type == "cuda":  # these matrices are not the run's memory
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * size**3 / min(taken)


def multiply(first: torch.Tensor, second: torch.Tensor, product: torch.Tensor) -> float:
    """Seconds that one product takes."""
    wait(first.device)
    started_at = time.perf_counter()
    torch.mm(first, second, out=product)
    wait(first.device)
    return time.perf_counter() - started_at


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
