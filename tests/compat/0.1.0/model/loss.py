"""The loss of a language model: cross-entropy in nats per token.

From hidden states rather than from logits, so that the (tokens x vocabulary) matrix, by far the largest of a training
step, never exists as a whole.

Shape letters: N tokens, C model width, V vocabulary, K tokens in one chunk.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
CHUNK_TOKENS = 1024
"""Tokens whose logits exist at a time: with fewer than 512 the matrix products lose speed, with more memory grows."""
CHUNK_TOKENS_ON_GPU = 4096
"""The same where the kernel of loss_triton.py works in half the memory."""


def shift_left(labels: Tensor) -> Tensor:
    """Turn labels (B, T), where labels[t] is token t itself, into the targets: targets[t] is token t + 1.

    The last position has no target and gets `IGNORE_INDEX`.
    """
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of `hidden_states @ weight.T` against `targets`, a chunk of tokens at a time.

    Within torch.compile it is one operation that no compiler looks into, for the same numbers and the same memory.

    Args:
        hidden_states: (..., C) output of the last norm.
        weight: (V, C) matrix of the output layer.
        targets: (...) ids of the tokens to predict; `IGNORE_INDEX` counts for nothing.
        num_items_in_batch: what the sum is divided by; None divides by the number of targets. A training loop gives
            the targets of the whole optimizer step, so that accumulation over unequal micro-batches stays a mean.
        softcap: the logits are `softcap * tanh(logits / softcap)`, above 0; None takes them as they are.

    Returns:
        Scalar in fp32, nats per token. NaN if there is no target and no `num_items_in_batch`.

    Source:
        The order of work (gradient of the logits in the forward pass, in place) is that of Hsu et al. 2024, "Liger
        Kernel: Efficient Triton Kernels for LLM Training", section 3.2, https://arxiv.org/abs/2410.10989
    """
    hidden_NC = hidden_states.reshape(-1, hidden_states.shape[-1])
    targets_N = targets.reshape(-1).to(hidden_NC.device)
    if torch.is_autocast_enabled(hidden_NC.device.type):
        hidden_NC = hidden_NC.to(torch.get_autocast_dtype(hidden_NC.device.type))
    if num_items_in_batch is None:
        num_items_in_batch = (targets_N != IGNORE_INDEX).sum()
    loss: Tensor
    if torch.compiler.is_compiling():
        # torch 2.11 compiles an autograd.Function that writes into what it saves to gradients of exactly 0.
        needs = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_NC, weight))
        loss, _, _ = linear_cross_entropy_op(hidden_NC, weight, targets_N, *needs, softcap)
    else:
        loss = LinearCrossEntropy.apply(hidden_NC, weight, targets_N, softcap)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def sum_and_gradients(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the cross-entropy over tokens, and make its gradients on the way.

    Args:
        hidden_NC: its dtype is that of the matrix products.
        weight_VC: in any dtype.
        targets_N: ids, or `IGNORE_INDEX`.
        needs_hidden: whether to make the gradient of the hidden states.
        needs_weight: whether to make that of the weight.
        softcap: see `linear_cross_entropy`.

    Returns:
        The sum, scalar in fp32; the gradients (N, C) in the dtype of the hidden states and (V, C) in fp32, each empty
        if it is not needed.
    """
    from .loss_triton import cross_entropy_, is_available  # when there is a loss to make: Triton is slow to import

    dtype, vocab_size = hidden_NC.dtype, len(weight_VC)
    wants_gradient = needs_hidden or needs_weight
    has_kernel = dtype != torch.float64 and is_available(hidden_NC.device)
    weight_WC = weight_VC.to(dtype)
    if has_kernel and vocab_size % 64:
        # There a product is faster where rows of logits begin at a multiple of 128 bytes. What is added counts for
        # nothing. Not elsewhere, since even padding by nothing copies the weight.
        weight_WC = F.pad(weight_WC, (0, 0, 0, -vocab_size % 64))
    total = torch.zeros((), dtype=torch.float32, device=hidden_NC.device)
    grad_hidden_NC = torch.empty_like(hidden_NC if needs_hidden else hidden_NC[:0])
    grad_weight_WC = torch.zeros_like(weight_WC if needs_weight else weight_WC[:0], dtype=torch.float32)
    size = CHUNK_TOKENS_ON_GPU if has_kernel else CHUNK_TOKENS
    for start in range(0, len(hidden_NC), size):
        hidden_KC, targets_K = hidden_NC[start : start + size], targets_N[start : start + size]
        logits_KW = hidden_KC @ weight_WC.t()
        slope_KW = None if softcap is None else cap_(logits_KW, softcap)
        if has_kernel:
            total += cross_entropy_(logits_KW, targets_K, vocab_size, IGNORE_INDEX, wants_gradient)
        else:
            total += cross_entropy_in_steps_(logits_KW, targets_K, wants_gradient)
        grad_KW = logits_KW if slope_KW is None else logits_KW.mul_(slope_KW)
        if needs_hidden:
            grad_hidden_NC[start : start + size] = grad_KW @ weight_WC
        if needs_weight and dtype == torch.float32:
            grad_weight_WC.addmm_(grad_KW.t(), hidden_KC)
        elif needs_weight and has_kernel:  # products of halves, added up in fp32
            torch.addmm(grad_weight_WC, grad_KW.t(), hidden_KC, out_dtype=torch.float32, out=grad_weight_WC)
        elif needs_weight:
            grad_weight_WC += grad_KW.t() @ hidden_KC
    return total, grad_hidden_NC, grad_weight_WC[:vocab_size]


def cap_(logits_KW: Tensor, softcap: float) -> Tensor:
    """Overwrite logits with `softcap * tanh(logits / softcap)`; returns the slope there, 1 - tanh²."""
    tanh_KW = (logits_KW.float() / softcap).tanh_()
    logits_KW.copy_(softcap * tanh_KW)
    return tanh_KW.square_().neg_().add_(1)


def cross_entropy_in_steps_(logits_KV: Tensor, targets_K: Tensor, wants_gradient: bool) -> Tensor:
    """Sum the cross-entropy over a chunk and, if wanted, overwrite its logits with their gradient.

    One matrix serves as logits, then as their exponentials, then as their gradient; half precision works on a copy.
    """
    kept_K1 = (targets_K != IGNORE_INDEX).unsqueeze(1).float()
    index_K1 = targets_K.masked_fill(targets_K == IGNORE_INDEX, 0).unsqueeze(1)
    work_KV = logits_KV.float()
    target_K1 = work_KV.gather(1, index_K1)
    max_K1 = work_KV.amax(dim=1, keepdim=True)
    exp_KV = work_KV.sub_(max_K1).exp_()
    sum_K1 = exp_KV.sum(dim=1, keepdim=True)
    if wants_gradient:
        # d loss / d logits is softmax(logits) - one_hot(target).
        grad_KV = exp_KV.mul_(kept_K1 / sum_K1).scatter_add_(1, index_K1, -kept_K1)
        if grad_KV is not logits_KV:
            logits_KV.copy_(grad_KV)
    return ((sum_K1.log() + max_K1 - target_K1) * kept_K1).sum()


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of the cross-entropy of a linear layer; its gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, softcap: float | None = None
    ) -> Tensor:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        total, *gradients = sum_and_gradients(hidden_NC, weight_VC, targets_N, needs_hidden, needs_weight, softcap)
        ctx.save_for_backward(*gradients)
        ctx.weight_dtype = weight_VC.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return scale_gradients(ctx, *grad_outputs)


def scale_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """The gradients that the forward pass saved, times that of the sum."""
    needs_hidden, needs_weight, *others = ctx.needs_input_grad
    grad_hidden_NC, grad_weight_VC = ctx.saved_tensors
    return (
        grad_hidden_NC * grad.to(grad_hidden_NC.dtype) if needs_hidden else None,
        (grad_weight_VC * grad).to(ctx.weight_dtype) if needs_weight else None,
        *(None for _ in others),
    )


# The model's code may be loaded several times in one process, from hfgpt and from folders: each has its own operation.
NAMESPACE = re.sub(r"\W", "_", __name__)
linear_cross_entropy_op = torch.library.custom_op(
    f"{NAMESPACE}::linear_cross_entropy", sum_and_gradients, mutates_args=()
)


@linear_cross_entropy_op.register_fake
def describe_outputs(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of what `sum_and_gradients` returns."""
    return (
        hidden_NC.new_empty((), dtype=torch.float32),
        torch.empty_like(hidden_NC if needs_hidden else hidden_NC[:0]),
        torch.empty_like(weight_VC if needs_weight else weight_VC[:0], dtype=torch.float32),
    )


def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what `scale_gradients` uses."""
    ctx.save_for_backward(*output[1:])
    ctx.weight_dtype = inputs[1].dtype
    ctx.set_materialize_grads(False)


linear_cross_entropy_op.register_autograd(scale_gradients, setup_context=save_gradients)
