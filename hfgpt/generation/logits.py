"""The rules of decoding, from scratch: each a small pure function from logits to logits.

First the rules about earlier tokens, then those that reshape the distribution of the next token. The order in which
they apply, and how a token is picked, is in decoding.py.

Shape letters: B batch, S tokens so far, V vocabulary, W windows of n tokens in S.
"""

import math

import torch
from torch import Tensor

from hfgpt.generation.params import range_error


def penalize_repetition(logits_BV: Tensor, ids_BS: Tensor, penalty: float, mask_BS: Tensor | None = None) -> Tensor:
    """Make tokens that occurred before less likely: their logits are divided by `penalty`, negative ones multiplied.

    The paper divides all of them, which would make tokens with a negative logit likelier; transformers, too, multiplies
    those.

    Args:
        logits_BV: unnormalised log-probabilities of the next token, (B, V).
        ids_BS: tokens so far, the prompt included, (B, S).
        penalty: above 0; 1 changes nothing, below 1 repetition is favoured.
        mask_BS: (B, S), 0 where a token is padding and does not count; None counts all.

    Returns:
        (B, V): the logits, changed where a token occurred, however often.

    Raises:
        ValueError: `penalty` is not above 0 and finite.

    Source:
        Keskar et al. 2019, "CTRL: A Conditional Transformer Language Model for Controllable Generation", section 4.1,
        https://arxiv.org/abs/1909.05858
    """
    if not 0 < penalty < math.inf:
        raise ValueError(range_error("repetition_penalty", penalty))
    occurred_BV = mark_ids(logits_BV, ids_BS, None if mask_BS is None else mask_BS != 0)
    penalized_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(occurred_BV, penalized_BV, logits_BV)


def forbid_repeated_ngrams(logits_BV: Tensor, ids_BS: Tensor, size: int, mask_BS: Tensor | None = None) -> Tensor:
    """Forbid every token that would complete a sequence of `size` tokens which occurred before.

    Args:
        logits_BV: unnormalised log-probabilities of the next token, (B, V).
        ids_BS: tokens so far, the prompt included, (B, S).
        size: n of the n-grams, at least 0; 1 lets no token occur twice, 0 forbids nothing.
        mask_BS: (B, S), 0 where a token is padding, on the left; None where there is none.

    Returns:
        (B, V): the logits, with -inf for the forbidden tokens.

    Raises:
        ValueError: `size` is negative.

    Source:
        Paulus et al. 2017, "A Deep Reinforced Model for Abstractive Summarization", section 2.5 (there of trigrams),
        https://arxiv.org/abs/1705.04304
    """
    if size < 0:
        raise ValueError(range_error("no_repeat_ngram_size", size))
    if size == 0 or ids_BS.size(1) < size:
        return logits_BV
    # Only n-grams that begin with the last n-1 tokens can be completed now. For n = 1 these are none, and all begin so.
    last_ids = ids_BS[:, ids_BS.size(1) - (size - 1) :]
    windows_BWn = ids_BS.unfold(1, size, 1)
    is_match_BW = (windows_BWn[:, :, :-1] == last_ids[:, None]).all(-1)
    if mask_BS is not None:
        is_match_BW &= mask_BS[:, : is_match_BW.size(1)] != 0  # padding is on the left, so the first token decides
    return logits_BV.masked_fill(mark_ids(logits_BV, windows_BWn[:, :, -1], is_match_BW), -math.inf)


def mark_ids(logits_BV: Tensor, ids_BS: Tensor, is_counted_BS: Tensor | None = None) -> Tensor:
    """(B, V) booleans: whether each token is among the row's ids that count."""
    vocab_size = logits_BV.size(-1)
    # What does not count is marked in a column of its own, which is cut off.
    columns_BS = ids_BS if is_counted_BS is None else ids_BS.masked_fill(~is_counted_BS, vocab_size)
    marks_BV = torch.zeros(len(logits_BV), vocab_size + 1, dtype=torch.bool, device=logits_BV.device)
    return marks_BV.scatter_(1, columns_BS, True)[:, :vocab_size]


def apply_temperature(logits_BV: Tensor, temperature: float) -> Tensor:
    """Sharpen (`temperature` below 1) or flatten (above 1) the distribution of the next token.

    Args:
        logits_BV: unnormalised log-probabilities of the next token, (B, V).
        temperature: what the logits are divided by, above 0; 1 changes nothing.

    Returns:
        (B, V): the logits, divided.

    Raises:
        ValueError: `temperature` is not above 0 and finite.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"`temperature` must be finite and above 0 to divide by, got {temperature}. "
            "`sample_next_token` takes 0 as greedy."
        )
    return logits_BV / temperature


def filter_top_k(logits_BV: Tensor, top_k: int) -> Tensor:
    """Keep the `top_k` likeliest tokens, and those that tie with the last of them.

    Args:
        logits_BV: unnormalised log-probabilities of the next token, (B, V).
        top_k: number of tokens to keep, at least 0; 0, and V or more, keep every token.

    Returns:
        (B, V): the logits, with -inf for every token less likely than the `top_k`-th.

    Raises:
        ValueError: `top_k` is negative.

    Source:
        Fan et al. 2018, "Hierarchical Neural Story Generation", section 5.4, https://arxiv.org/abs/1805.04833
    """
    if top_k < 0:
        raise ValueError(range_error("top_k", top_k))
    if top_k == 0:
        return logits_BV
    kth_B1 = logits_BV.topk(min(top_k, logits_BV.size(-1))).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)


def filter_top_p(logits_BV: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of tokens whose probabilities sum to at least `top_p`.

    Args:
        logits_BV: unnormalised log-probabilities of the next token, (B, V).
        top_p: probability to keep, in (0, 1]; 1 keeps every token.

    Returns:
        (B, V): the logits, with -inf for every token outside the set. The likeliest token always stays.

    Raises:
        ValueError: `top_p` is not in (0, 1].

    Source:
        Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1, https://arxiv.org/abs/1904.09751
    """
    if not 0 < top_p <= 1:
        raise ValueError(range_error("top_p", top_p))
    if top_p == 1:
        return logits_BV
    # From the unlikeliest token up: each one sees the probability that would go if it and all below it were removed.
    # Summing from this end keeps the small probabilities exact, and cuts where transformers' TopPLogitsWarper cuts.
    sorted_BV, order_BV = logits_BV.sort()
    is_removed_BV = sorted_BV.softmax(-1).cumsum(-1) <= 1 - top_p
    is_removed_BV[:, -1] = False
    return logits_BV.masked_fill(is_removed_BV.scatter(-1, order_BV, is_removed_BV), -math.inf)


def filter_min_p(logits_BV: Tensor, min_p: float) -> Tensor:
    """Keep the tokens that are at least `min_p` times as likely as the likeliest: few where the model is sure.

    Args:
        logits_BV: unnormalised log-probabilities of the next token, (B, V).
        min_p: share of the largest probability, in [0, 1]; 0 keeps every token, 1 the likeliest.

    Returns:
        (B, V): the logits, with -inf for every token less likely than that.

    Raises:
        ValueError: `min_p` is not in [0, 1].

    Source:
        Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs", section 3,
        https://arxiv.org/abs/2407.01082
    """
    if not 0 <= min_p <= 1:
        raise ValueError(range_error("min_p", min_p))
    if min_p == 0:
        return logits_BV
    probabilities_BV = logits_BV.softmax(-1)
    return logits_BV.masked_fill(probabilities_BV < min_p * probabilities_BV.amax(-1, keepdim=True), -math.inf)
