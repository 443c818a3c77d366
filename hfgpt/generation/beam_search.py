"""Beam search from scratch: the texts that the model finds likeliest as a whole, not token by token.

It keeps `num_beams` unfinished texts per row, continues each with every token, and keeps the best again; texts that end
are set aside, scored by their mean log-probability or, with another length penalty, by something between sum and mean.
What is kept and when it stops is as in transformers 5.23's `generate`.

Shape letters: B rows, N beams per row, K candidates per row, T tokens that go into one call, S tokens so far,
V vocabulary, E ids that end a text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfgpt.generation.cpu_step import OneTokenStep, is_plain
from hfgpt.generation.decoding import (
    apply_history,
    check_finite_logits,
    check_length,
    check_prompt,
    check_stop,
    next_logits,
    no_token_left,
    stop_ids_of,
)
from hfgpt.generation.params import SamplingParams


@dataclass(frozen=True)
class Beam:
    """A text that beam search found.

    Attributes:
        ids: the new tokens, with the one that ended the text.
        log_probability: of all new tokens together, in nats, under the rules about earlier tokens.
        score: `log_probability` / number of new tokens ** `length_penalty`.
    """

    ids: list[int]
    log_probability: float
    score: float


def beam_search(
    model: Any,
    input_ids: Tensor,
    params: SamplingParams,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    suppress_mask: Tensor | None = None,
    is_stopped: Callable[[list[int]], bool] | None = None,
) -> list[list[Beam]]:
    """Search the likeliest texts after `input_ids`.

    The prompts are read once; keys and values are cached and follow their beams. Nothing is sampled. Of `params` count:

    - `max_new_tokens`: a text of so many tokens is finished. T + `max_new_tokens` must fit the model.
    - `num_beams`: texts to keep per row. With as many as there are texts the search is exhaustive.
    - `length_penalty`: exponent of the length that a text's log-probability is divided by; 0 favours short texts, 1
      takes the mean, more favours long ones.
    - `early_stopping`: True stops a row once it has `num_beams` finished texts; False also continues while the best
      unfinished text, at its present length, would beat the worst finished one; "never" takes for that the best that it
      could become, which is the only exact way if `length_penalty` is above 0.
    - the rules about earlier tokens, on log-probabilities, as in transformers.

    Args:
        model: as for `hfgpt.generation.decoding.generate_stream`.
        input_ids: prompts, (B, T) with T at least 1; shorter ones are padded on the left.
        params: how.
        eos_token_id: id or ids that end a text.
        attention_mask: (B, T), 1 for a token, 0 for padding; None means no padding.
        suppress_mask: (V,), True for ids never to be written.
        is_stopped: is given all new ids of a text and returns whether it ends with them.

    Returns:
        Per row up to `num_beams` finished texts, the best first.

    Raises:
        ValueError: prompts, length or `stop` are refused as by `generate_stream`, or no text is left to write.
        FloatingPointError: the model's logits are no numbers.

    Source:
        Graves 2012, "Sequence Transduction with Recurrent Neural Networks", section 2.5, https://arxiv.org/abs/1211.3711;
        dividing by the length: Wu et al. 2016, "Google's Neural Machine Translation System", section 7,
        https://arxiv.org/abs/1609.08144 (there with another formula, `generate`'s is the one above).
    """
    num_beams, max_new_tokens, length_penalty = params.num_beams, params.max_new_tokens, params.length_penalty
    check_stop(params, is_stopped)
    check_prompt(input_ids, attention_mask)
    check_length(input_ids.size(1), max_new_tokens, model.config.max_position_embeddings)
    stop_ids = stop_ids_of(eos_token_id)
    # Each beam may end once with each stop id, and there must still be `num_beams` candidates that go on.
    num_candidates = max(2, 1 + len(stop_ids)) * num_beams
    B, prompt_length = input_ids.shape

    finished: list[list[Beam]] = [[] for _ in range(B)]
    is_open = [True] * B
    mask_BS = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    logits_BV, cache = next_logits(model, input_ids, mask_BS, {})
    check_finite_logits(logits_BV)
    (read,) = cache.values()
    step = OneTokenStep(model, read, mask_BS, prompt_length + max_new_tokens) if is_plain(model, "cpu") else None
    # At the start all beams of a row go on from its prompt.
    select_rows(cache, step, torch.arange(B, device=input_ids.device).repeat_interleave(num_beams))
    logits_NV = logits_BV.repeat_interleave(num_beams, dim=0)
    ids_NS = input_ids.repeat_interleave(num_beams, dim=0)
    mask_NS = mask_BS.repeat_interleave(num_beams, dim=0)
    # At the start all beams of a row are the same text: only the first may be continued.
    totals_BN = torch.full((B, num_beams), -math.inf, device=input_ids.device)
    totals_BN[:, 0] = 0
    first_beams_B1 = torch.arange(B, device=input_ids.device)[:, None] * num_beams

    for length in range(1, max_new_tokens + 1):
        log_probabilities_NV = apply_history(logits_NV.float().log_softmax(-1), params, ids_NS, mask_NS, suppress_mask)
        totals_BNV = totals_BN[:, :, None] + log_probabilities_NV.view(B, num_beams, -1)
        vocab_size = totals_BNV.size(-1)
        num_kept = min(num_candidates, num_beams * vocab_size)
        totals_BK, candidates_BK = totals_BNV.flatten(1).topk(num_kept)
        beams_BK, next_BK = candidates_BK // vocab_size + first_beams_B1, candidates_BK % vocab_size
        new_ids_BKS = torch.cat([ids_NS[beams_BK, prompt_length:], next_BK[:, :, None]], dim=-1)

        has_ended_BK = torch.isin(next_BK, torch.tensor(stop_ids, dtype=torch.int64, device=input_ids.device))
        if is_stopped is not None:
            answers = [[is_stopped(ids) for ids in row] for row in new_ids_BKS.tolist()]
            has_ended_BK |= torch.tensor(answers, device=input_ids.device)
        if length == max_new_tokens:
            has_ended_BK[:] = True
        # Only what is among the best `num_beams` may end; the candidates after those are there to go on.
        may_end_BN = has_ended_BK[:, :num_beams] & totals_BK[:, :num_beams].isfinite()
        for row, k in may_end_BN.nonzero().tolist():
            if is_open[row]:
                total = float(totals_BK[row, k])
                finished[row].append(Beam(new_ids_BKS[row, k].tolist(), total, total / length**length_penalty))
        finished = [sorted(beams, key=lambda beam: -beam.score)[:num_beams] for beams in finished]
        totals_BN, order_BN = totals_BK.masked_fill(has_ended_BK, -math.inf).topk(num_beams)

        for row, best_total in enumerate(totals_BN[:, 0].tolist()):
            if len(finished[row]) == num_beams:
                likeliest_length = max_new_tokens if params.early_stopping == "never" and length_penalty > 0 else length
                hope = best_total / likeliest_length**length_penalty
                is_open[row] &= params.early_stopping is not True and hope > finished[row][-1].score
            is_open[row] &= best_total > -math.inf
        if not any(is_open):
            break

        beams_N = beams_BK.gather(1, order_BN).flatten()
        next_N1 = next_BK.gather(1, order_BN).view(-1, 1)
        ids_NS = torch.cat([ids_NS[beams_N], next_N1], dim=1)
        mask_NS = torch.cat([mask_NS, mask_NS.new_ones(len(mask_NS), 1)], dim=1)
        select_rows(cache, step, beams_N)
        if step:
            logits_NV = step(next_N1[:, 0])
        else:
            logits_NV, cache = next_logits(model, next_N1, mask_NS, cache)
    if not all(finished):
        raise ValueError(no_token_left(params))
    return finished


def select_rows(cache: dict[str, Any], step: OneTokenStep | None, rows_N: Tensor) -> None:
    """Let keys and values be those of these rows, (N,), some of them perhaps more than once."""
    if step is not None:
        step.select_rows(rows_N)
        return
    for each in cache.values():
        each.reorder_cache(rows_N)
