"""Decoding's Triton kernels: what one new token per row needs of a GPU in few launches.

A product with a single row reads each weight once, so memory is its limit, and norm, bias, activation and residual come
with it for nothing; attention of one query per row reads keys and values where they lie; a sample needs no round trip.

Shape letters: B rows, C model width, H heads, D head width, K inputs and N outputs of a linear layer, P places of the
cache, V vocabulary.
"""

import torch
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # torch brings Triton where it has a GPU to run it on
    triton = None

if triton is not None:

    @triton.jit
    def linear_kernel(
        x, gain, shift, weight0, weight1, weight2, bias0, bias1, bias2, out, N, K, eps,
        NORM: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """One row through up to three layers side by side: norm, product, bias, activation, sum, rounded as in torch.

        Programs: (blocks of N, layers). Each normalises the whole row for itself; BLOCK_K is at least K.
        """
        dtype = out.dtype.element_ty
        layer = tl.program_id(1)
        weight, bias = weight0, bias0
        if layer == 1:
            weight, bias = weight1, bias1
        if layer == 2:
            weight, bias = weight2, bias2
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        inside = k < K
        # First, so that the weights are on their way while the row is normalised.
        weights = tl.load(
            weight + n[:, None].to(tl.int64) * K + k[None, :], mask=(n < N)[:, None] & inside[None, :], other=0.0
        )
        row = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            factor = tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
            term = tl.load(shift + k, mask=inside, other=0.0).to(tl.float32)
            centred = tl.where(inside, row - tl.sum(row, 0) / K, 0.0)
            row = centred / tl.sqrt(tl.sum(centred * centred, 0) / K + eps) * factor + term
            row = row.to(dtype).to(tl.float32)
        result = tl.sum(weights.to(tl.float32) * row[None, :], 1)
        if BIAS:
            result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        result = result.to(dtype).to(tl.float32)
        if GELU:  # 0.5 x (1 + tanh(u)) is x sigmoid(2 u)
            result = result * tl.sigmoid(1.5957691216057308 * (result + 0.044715 * result * result * result))
            result = result.to(dtype).to(tl.float32)
        if ADD:
            result += tl.load(out + layer * N + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(out + layer * N + n, result.to(dtype), mask=n < N)

    @triton.jit
    def attention_kernel(
        query, key, value, keys, values, mask, length, out, places, heads, scaling,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    ):  # fmt: skip
        """One query of one head of one row a program: its key and value go to their place in the cache on the way."""
        row = (tl.program_id(0) // heads).to(tl.int64)
        head = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, BLOCK_D)
        is_d = d < D
        new_place = tl.load(length)
        keys += head * places * D
        values += head * places * D
        mask += row * places
        q = tl.load(query + head * D + d, mask=is_d, other=0.0).to(tl.float32) * scaling
        new_key = tl.load(key + head * D + d, mask=is_d, other=0.0)
        new_value = tl.load(value + head * D + d, mask=is_d, other=0.0)
        tl.store(keys + new_place * D + d, new_key, mask=is_d)
        tl.store(values + new_place * D + d, new_value, mask=is_d)
        # The running softmax begins with the token itself.
        top = tl.sum(q * new_key.to(tl.float32), 0)
        total = top * 0.0 + 1.0
        attended = new_value.to(tl.float32)
        for start in range(0, new_place, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            is_before = p < new_place
            inside = is_before[:, None] & is_d[None, :]
            key_block = tl.load(keys + p[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
            value_block = tl.load(values + p[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
            is_seen = tl.load(mask + p, mask=is_before, other=0) != 0
            scores = tl.where(is_seen, tl.sum(key_block * q[None, :], 1), -float("inf"))
            larger = tl.maximum(top, tl.max(scores, 0))
            weights = tl.exp(scores - larger)
            shrink = tl.exp(top - larger)
            attended = attended * shrink + tl.sum(value_block * weights[:, None], 0)
            total = total * shrink + tl.sum(weights, 0)
            top = larger
        tl.store(out + head * D + d, (attended / total).to(out.dtype.element_ty), mask=is_d)

    @triton.jit
    def sampling_kernel(logits, seeds, positions, out, vocab_size, BLOCK: tl.constexpr):
        """One row a program: the token that is first in a race, where token v takes an exponential time / exp(logit).

        The first is v with the probability softmax(logits)[v]. The times depend on seed, position and token alone.
        """
        row = tl.program_id(0).to(tl.int64)
        seed, position = tl.load(seeds + row), tl.load(positions + row)
        columns = tl.arange(0, BLOCK)
        best = tl.full([BLOCK], -float("inf"), tl.float32)
        winner = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocab_size, BLOCK):
            token = start + columns
            logit = tl.load(logits + row * vocab_size + token, mask=token < vocab_size, other=-float("inf"))
            uniform = tl.maximum(tl.rand(seed, position.to(tl.int32) * vocab_size + token), 2.0**-32)
            # -log(1 - uniform); where that is small, 1 - uniform would have lost its digits.
            series = uniform * (1 + uniform * (0.5 + uniform * (1 / 3)))
            time = tl.where(uniform < 0.001, series, -tl.log(1 - uniform))
            score = logit - tl.log(time)
            winner = tl.where(score > best, token, winner)
            best = tl.maximum(score, best)
        first = tl.max(best, 0)
        tl.store(out + row, tl.min(tl.where(best == first, winner, vocab_size), 0).to(tl.int64))


def linear_(
    x_1K: Tensor,
    layers: list[nn.Linear],
    out: Tensor,
    *,
    norm: nn.LayerNorm | None = None,
    gelu: bool = False,
    add: bool = False,
) -> Tensor:
    """Write what one, two or three linear layers of equal shape make of one row: `out` is (layers, N) in memory.

    Args:
        x_1K: the row.
        layers: with weights (N, K), all with a bias or none.
        out: overwritten, or, with `add`, added to.
        norm: applied to the row before.
        gelu: whether GPT-2's tanh GELU follows.
        add: whether `out` holds a residual stream to add to.

    Returns:
        `out`.
    """
    n, k = layers[0].weight.shape
    weights = [each.weight for each in layers] + [layers[0].weight] * (3 - len(layers))
    biases = [each.bias for each in layers] + [layers[0].bias] * (3 - len(layers))
    has_bias = biases[0] is not None
    block_n, warps = (8, 4) if n > 16384 else (2, 4) if k <= 1024 else (4, 16)  # the fastest of 13 on an H200
    linear_kernel[(triton.cdiv(n, block_n), len(layers))](
        x_1K,
        x_1K if norm is None else norm.weight,
        x_1K if norm is None else norm.bias,
        *weights,
        *(biases if has_bias else weights),
        out,
        n,
        k,
        0.0 if norm is None else norm.eps,
        NORM=norm is not None,
        BIAS=has_bias,
        GELU=gelu,
        ADD=add,
        BLOCK_N=block_n,
        BLOCK_K=triton.next_power_of_2(k),
        num_warps=warps,
    )
    return out


def attend(
    query_BC: Tensor,
    key_BC: Tensor,
    value_BC: Tensor,
    keys_BHPD: Tensor,
    values_BHPD: Tensor,
    mask_BP: Tensor,
    length: Tensor,
    scaling: float,
) -> Tensor:
    """Let one new token per row look at itself and at the tokens of the cache, and put it there.

    Args:
        query_BC: contiguous, as are the next two.
        key_BC: of the new tokens.
        value_BC: of the new tokens.
        keys_BHPD: the cache, of which places before `length` are read and place `length` is written.
        values_BHPD: the same.
        mask_BP: int64, 0 where a place holds padding.
        length: (1,) int64 on the device: tokens in the cache.
        scaling: factor on the scores.

    Returns:
        (B, C), attended.
    """
    rows, heads, places, width = keys_BHPD.shape
    out_BC = torch.empty_like(query_BC)
    attention_kernel[(rows * heads,)](
        query_BC,
        key_BC,
        value_BC,
        keys_BHPD,
        values_BHPD,
        mask_BP,
        length,
        out_BC,
        places,
        heads,
        scaling,
        D=width,
        BLOCK_D=triton.next_power_of_2(width),
        BLOCK_P=256,
        num_warps=8,
    )
    return out_BC


def sample(logits_BV: Tensor, seeds_B: Tensor, positions_B: Tensor) -> Tensor:
    """Draw a token from softmax(logits) for each row.

    Args:
        logits_BV: fp32, -inf for what must not be drawn.
        seeds_B: int64; with one of its own, a row draws as it would alone.
        positions_B: int64, of which each gives the row other random numbers.

    Returns:
        (B,) ids, int64.

    Source:
        The race is the Gumbel-max trick: Maddison et al. 2014, "A* Sampling", section 2, https://arxiv.org/abs/1411.0030
    """
    out_B = torch.empty_like(seeds_B)
    sampling_kernel[(len(logits_BV),)](
        logits_BV, seeds_B, positions_B, out_B, logits_BV.shape[1], BLOCK=4096, num_warps=16
    )
    return out_B
