"""The softmax of loss.py on a GPU, in one Triton kernel: logits become the gradient of their loss where they stand.

Shape letters: K tokens in one chunk, W columns of the logits in memory, V vocabulary (V ≤ W).
"""

import functools
import warnings

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch brings Triton where it has a GPU to run it on
    triton = None

if triton is not None:

    @triton.jit
    def softmax_kernel(
        logits,
        targets,
        losses,
        row_stride,
        vocab_size,
        ignore_index,
        WIDTH: tl.constexpr,
        GRADIENT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program a row; it reads the row twice, of which the second time comes from the cache, and writes it."""
        row = tl.program_id(0).to(tl.int64)
        logits += row * row_stride
        target = tl.load(targets + row)
        is_kept = target != ignore_index
        is_id = (target >= 0) & (target < vocab_size)
        columns = tl.arange(0, BLOCK)
        # Each lane keeps the largest logit that it has met, and the sum of exponentials relative to it.
        top = tl.load(logits + columns, mask=columns < vocab_size, other=-float("inf")).to(tl.float32)
        lane_max = tl.maximum(top, -1e30)
        lane_sum = tl.exp(top - lane_max)
        for start in range(BLOCK, vocab_size, BLOCK):
            inside = start + columns < vocab_size
            value = tl.load(logits + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
            ratio = tl.exp(-tl.abs(value - lane_max))  # of the smaller exponential to the larger: one is enough
            lane_sum = tl.where(value > lane_max, lane_sum * ratio + 1, lane_sum + ratio)
            lane_max = tl.maximum(lane_max, value)
        row_max = tl.max(lane_max, 0)
        log_sum = row_max + tl.log(tl.sum(lane_sum * tl.exp(lane_max - row_max), 0))
        loss = log_sum - tl.load(logits + tl.where(is_id, target, 0)).to(tl.float32)
        loss = tl.where(is_id, loss, float("nan"))  # no id of the vocabulary: training stops at it
        tl.store(losses + row, tl.where(is_kept, loss, 0.0))
        if GRADIENT:
            tl.debug_barrier()  # the target's logit has been read before it is overwritten
            for start in range(0, WIDTH, BLOCK):
                inside = start + columns < WIDTH
                value = tl.load(logits + start + columns, mask=inside, other=0.0).to(tl.float32)
                gradient = tl.exp(value - log_sum) - tl.where(start + columns == target, 1.0, 0.0)
                gradient = tl.where(is_kept & (start + columns < vocab_size), gradient, 0.0)
                tl.store(logits + start + columns, gradient.to(logits.dtype.element_ty), mask=inside)


def cross_entropy_(
    logits_KW: Tensor, targets_K: Tensor, vocab_size: int, ignore_index: int, wants_gradient: bool
) -> Tensor:
    """Sum the cross-entropy over a chunk and, if wanted, overwrite its logits with their gradient.

    Args:
        logits_KW: rows of a contiguous matrix; columns from `vocab_size` on count for nothing and get gradient 0.
        targets_K: int64 ids; one that is not in the vocabulary makes the sum NaN.
        vocab_size: V, the columns that are logits.
        ignore_index: the target that counts for nothing.
        wants_gradient: whether to write softmax(logits) - one_hot(target), in the dtype of the logits.

    Returns:
        Scalar in fp32, nats.
    """
    losses_K = torch.empty(len(logits_KW), dtype=torch.float32, device=logits_KW.device)
    with torch.cuda.device(logits_KW.device):  # Triton launches on the current one
        softmax_kernel[(len(logits_KW),)](
            logits_KW,
            targets_K,
            losses_K,
            logits_KW.stride(0),
            vocab_size,
            ignore_index,
            WIDTH=logits_KW.shape[1],
            GRADIENT=wants_gradient,
            BLOCK=4096,
            num_warps=16,
        )
    return losses_K.sum()


@functools.cache
def is_available(device: torch.device) -> bool:
    """Whether the kernel, and the product that accumulates in fp32, run on a device; warns once if they do not.

    Triton needs a C compiler when it first runs, which not every machine with a GPU has.
    """
    if triton is None or device.type != "cuda":
        return False
    half = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, half, half, out_dtype=torch.float32, out=total)
        cross_entropy_(half, torch.zeros(16, dtype=torch.int64, device=device), 16, -100, wants_gradient=True)
    except Exception as error:  # whatever the compiler, the driver or cuBLAS has against it
        warnings.warn(f"the loss takes its slower way on {device}, for Triton fails there: {error}", stacklevel=2)
        return False
    return True
