"""The loss of a language model: cross-entropy in nats per token.

From hidden states rather than from logits, so that the (tokens x vocabulary) matrix, by far the largest of a training
step, never exists as a whole.

Shape letters: N tokens, C model width, V vocabulary, W a multiple of 64 above it, K tokens in one chunk, L lost ones.
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

    dtype, vocab_size, size = hidden_NC.dtype, len(weight_VC), CHUNK_TOKENS
    wants_gradient = needs_hidden or needs_weight
    has_kernel = dtype != torch.float64 and is_available(hidden_NC.device)
    weight_WC = weight_VC.to(dtype)
    # A product is faster where rows of logits begin at a multiple of 64 elements. What is added counts for nothing.
    padded_size = vocab_size + -vocab_size % 64
    if has_kernel:
        size = CHUNK_TOKENS_ON_GPU
        weight_WC = F.pad(weight_WC, (0, 0, 0, padded_size - vocab_size)) if vocab_size % 64 else weight_WC
    else:  # the memory of all chunks, with room at the end of each row: even padding by nothing would copy the weight
        room_KW = hidden_NC.new_empty(min(size, len(hidden_NC)), padded_size)
    total = torch.zeros((), dtype=torch.float32, device=hidden_NC.device)
    grad_hidden_NC = torch.empty_like(hidden_NC if needs_hidden else hidden_NC[:0])
    is_overwritten = dtype == torch.float32 and not has_kernel and len(hidden_NC) > 0  # by the first product
    begin = torch.empty_like if is_overwritten else torch.zeros_like
    grad_weight_WC = begin(weight_WC if needs_weight else weight_WC[:0], dtype=torch.float32)
    for start in range(0, len(hidden_NC), size):
        hidden_KC, targets_K = hidden_NC[start : start + size], targets_N[start : start + size]
        if has_kernel:
            grad_KW = hidden_KC @ weight_WC.t()
            slope_KW = None if softcap is None else cap_(grad_KW, softcap)
            total += cross_entropy_(grad_KW, targets_K, vocab_size, IGNORE_INDEX, wants_gradient)
            grad_KW = grad_KW if slope_KW is None else grad_KW.mul_(slope_KW)
        else:
            room = room_KW[: len(hidden_KC)]
            total += cross_entropy_in_steps_(hidden_KC, weight_WC, targets_K, room, softcap, wants_gradient)
            grad_KW = room[:, :vocab_size]
        if needs_hidden:
            torch.mm(grad_KW, weight_WC, out=grad_hidden_NC[start : start + size])
        if needs_weight and dtype == torch.float32:
            grad_weight_WC.addmm_(grad_KW.t(), hidden_KC, beta=0 if is_overwritten and start == 0 else 1)
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


def cross_entropy_in_steps_(
    hidden_KC: Tensor,
    weight_VC: Tensor,
    targets_K: Tensor,
    room_KW: Tensor,
    softcap: float | None,
    wants_gradient: bool,
) -> Tensor:
    """Sum the cross-entropy over a chunk and, if wanted, leave the gradient of its logits in the memory given.

    One matrix serves as logits, then as their probabilities, then as their gradient; half precision works on a copy.
    """
    vocab_size = len(weight_VC)
    logits_KV = torch.mm(hidden_KC, weight_VC.t(), out=room_KW[:, :vocab_size])
    slope_KV = None if softcap is None else cap_(logits_KV, softcap)
    room_KW[:, vocab_size:] = -torch.inf
    is_ignored_K = targets_K == IGNORE_INDEX
    index_K1 = targets_K.masked_fill(is_ignored_K, 0).unsqueeze(1)
    work_KW = room_KW.float()
    # On CPUs in place, and row by row: what one pass over a row leaves is still in the cache when the next begins.
    probabilities_KW = torch.softmax(work_KW, dim=1, out=work_KW if work_KW.device.type == "cpu" else None)
    target_K = probabilities_KW.gather(1, index_K1).squeeze(1)
    losses_K = -target_K.log()
    is_lost_K = (target_K < torch.finfo(torch.float32).tiny) & ~is_ignored_K
    if is_lost_K.any():  # more than 87 nats, which no probability in fp32 tells: rare, so made anew from their logits
        logits_LV = (hidden_KC[is_lost_K] @ weight_VC.t()).float()
        if softcap is not None:
            cap_(logits_LV, softcap)
        losses_K[is_lost_K] = F.cross_entropy(logits_LV, targets_K[is_lost_K], reduction="none")
    if wants_gradient:
        # d loss / d logits is softmax(logits) - one_hot(target).
        grad_KW = probabilities_KW.scatter_add_(1, index_K1, probabilities_KW.new_full(index_K1.shape, -1.0))
        grad_KW.index_fill_(0, is_ignored_K.nonzero().squeeze(1), 0)
        if grad_KW is not room_KW:
            room_KW.copy_(grad_KW)
        if slope_KV is not None:
            logits_KV.mul_(slope_KV)
    return losses_K.masked_fill(is_ignored_K, 0).sum()


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
