"""The loss of a language model: cross-entropy in nats per token.

From hidden states rather than from logits, so that the (tokens x vocabulary) matrix, by far the largest of a training
step, never exists as a whole.

Shape letters: N tokens, C model width, V vocabulary, K tokens in one chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
CHUNK_TOKENS = 1024
"""Tokens whose logits exist at a time: with fewer than 512 the matrix products lose speed, with more memory grows."""


def shift_left(labels: Tensor) -> Tensor:
    """Turn labels (B, T), where labels[t] is token t itself, into the targets: targets[t] is token t + 1.

    The last position has no target and gets `IGNORE_INDEX`.
    """
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]


def linear_cross_entropy(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Cross-entropy of `hidden_states @ weight.T` against `targets`, a chunk of tokens at a time.

    Within torch.compile it is written out in plain operations: the same numbers, but all logits exist at once.

    Args:
        hidden_states: (..., C) output of the last norm.
        weight: (V, C) matrix of the output layer.
        targets: (...) ids of the tokens to predict; `IGNORE_INDEX` counts for nothing.
        num_items_in_batch: what the sum is divided by; None divides by the number of targets. A training loop gives
            the targets of the whole optimizer step, so that accumulation over unequal micro-batches stays a mean.

    Returns:
        Scalar in fp32, nats per token. NaN if there is no target and no `num_items_in_batch`.

    Source:
        The order of work (gradient of the logits in the forward pass, in place) is that of Hsu et al. 2024, "Liger
        Kernel: Efficient Triton Kernels for LLM Training", section 3.2, https://arxiv.org/abs/2410.10989
    """
    hidden_NC = hidden_states.reshape(-1, hidden_states.shape[-1])
    targets_N = targets.reshape(-1).to(hidden_NC.device)
    if torch.is_autocast_enabled(hidden_NC.device.type):
        dtype = torch.get_autocast_dtype(hidden_NC.device.type)
        hidden_NC, weight = hidden_NC.to(dtype), weight.to(dtype)
    if num_items_in_batch is None:
        num_items_in_batch = (targets_N != IGNORE_INDEX).sum()
    loss: Tensor
    if torch.compiler.is_compiling():
        # torch 2.11 compiles an autograd.Function that writes into what it saves to gradients of exactly 0. With
        # operations that it can differentiate by itself every torch is right, and it holds no more of them at a time.
        logits_NV = F.linear(hidden_NC, weight).float()
        loss = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="sum")
    else:
        loss = LinearCrossEntropy.apply(hidden_NC, weight, targets_N)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of the cross-entropy of a linear layer; its gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float32, device=hidden_NC.device)
        grad_hidden_NC = torch.empty_like(hidden_NC) if needs_hidden else None
        grad_weight_VC = torch.zeros_like(weight_VC, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(hidden_NC), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            hidden_KC, targets_K = hidden_NC[chunk], targets_N[chunk]
            kept_K1 = (targets_K != IGNORE_INDEX).unsqueeze(1).float()
            index_K1 = targets_K.masked_fill(targets_K == IGNORE_INDEX, 0).unsqueeze(1)
            logits_KV = (hidden_KC @ weight_VC.t()).float()
            target_K1 = logits_KV.gather(1, index_K1)
            max_K1 = logits_KV.amax(dim=1, keepdim=True)
            # One matrix serves as logits, then as their exponentials, then as their gradient.
            exp_KV = logits_KV.sub_(max_K1).exp_()
            sum_K1 = exp_KV.sum(dim=1, keepdim=True)
            total += ((sum_K1.log() + max_K1 - target_K1) * kept_K1).sum()
            if not (needs_hidden or needs_weight):
                continue
            # d loss / d logits is softmax(logits) - one_hot(target).
            grad_KV = exp_KV.mul_(kept_K1 / sum_K1).scatter_add_(1, index_K1, -kept_K1).to(weight_VC.dtype)
            if grad_hidden_NC is not None:
                grad_hidden_NC[chunk] = grad_KV @ weight_VC
            if grad_weight_VC is not None and grad_weight_VC.dtype == grad_KV.dtype:
                grad_weight_VC.addmm_(grad_KV.t(), hidden_KC)
            elif grad_weight_VC is not None:
                grad_weight_VC += grad_KV.t() @ hidden_KC
        ctx.save_for_backward(grad_hidden_NC, grad_weight_VC)
        ctx.weight_dtype = weight_VC.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grad_outputs
        grad_hidden_NC, grad_weight_VC = ctx.saved_tensors
        return (
            None if grad_hidden_NC is None else grad_hidden_NC * grad.to(grad_hidden_NC.dtype),
            None if grad_weight_VC is None else (grad_weight_VC * grad).to(ctx.weight_dtype),
            None,
        )
