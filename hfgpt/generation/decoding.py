"""Decoding from scratch: from the logits of the next token to that token, and the loop that lets a model write.

Read top to bottom: the order in which the rules of rules.py apply, what picks the next token, the loop around the model
and its checks. Works with every transformers-style causal language model. Beam search is in beams.py; how ids become
text, and where a text stops, in text_stream.py.

Shape letters: B batch, T tokens that go into one call of the model, S tokens so far (cached + T), V vocabulary,
E ids that end a row.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hfgpt.generation.logits import (
    apply_temperature,
    check_rules,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    forbid_repeated_ngrams,
    penalize_repetition,
)
from hfgpt.generation.params import Rules

Generators = torch.Generator | Sequence[torch.Generator] | None
"""Random numbers of the logits' device: of all rows together, of each row its own, or, with None, torch's own."""


def apply_history(
    logits_BV: Tensor,
    rules: Rules,
    ids_BS: Tensor,
    mask_BS: Tensor | None = None,
    suppress_V: Tensor | None = None,
) -> Tensor:
    """Apply what does not depend on the distribution: the two rules about earlier tokens, and ids that nobody knows.

    Args:
        logits_BV: unnormalised log-probabilities of the next token, (B, V).
        rules: of which only `repetition_penalty` and `no_repeat_ngram_size` matter.
        ids_BS: tokens so far, (B, S).
        mask_BS: (B, S), 0 where a token is padding; None where there is none.
        suppress_V: (V,), True for ids that are in the model's vocabulary only to round its size up.

    Returns:
        (B, V): the logits; the tokens forbidden have -inf, which may be all.
    """
    if suppress_V is not None:
        logits_BV = logits_BV.masked_fill(suppress_V, -math.inf)
    if rules.repetition_penalty != 1:
        logits_BV = penalize_repetition(logits_BV, ids_BS, rules.repetition_penalty, mask_BS)
    if rules.no_repeat_ngram_size:
        logits_BV = forbid_repeated_ngrams(logits_BV, ids_BS, rules.no_repeat_ngram_size, mask_BS)
    return logits_BV


def process_logits(
    logits_BV: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Apply the temperature, then `top_k`, `top_p` and `min_p`, in transformers' order.

    Args:
        logits_BV: unnormalised log-probabilities of the next token, (B, V), in any floating-point type.
        temperature: at least 0; 0 leaves the likeliest token alone, whatever the rest.
        top_k: see `filter_top_k`.
        top_p: see `filter_top_p`.
        min_p: see `filter_min_p`.

    Returns:
        (B, V): fp32 logits, of which the softmax is sampled from.

    Raises:
        ValueError: a setting that `check_rules` refuses.
    """
    check_rules(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits_BV = logits_BV.float()  # in bf16 the probabilities of a large vocabulary would not sum to 1
    if temperature == 0:
        best_B1 = logits_BV.argmax(-1, keepdim=True)
        return torch.full_like(logits_BV, -math.inf).scatter(-1, best_B1, 0.0)
    logits_BV = filter_top_k(apply_temperature(logits_BV, temperature), top_k)
    return filter_min_p(filter_top_p(logits_BV, top_p), min_p)


def sample_next_token(
    logits_BV: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator: Generators = None,
) -> Tensor:
    """Pick the next token of every row: the likeliest at temperature 0, otherwise a sample.

    Args:
        logits_BV: unnormalised log-probabilities of the next token, (B, V), in any floating-point type.
        temperature: at least 0; 0 is greedy, and then nothing below has an effect.
        top_k: see `filter_top_k`.
        top_p: see `filter_top_p`.
        min_p: see `filter_min_p`.
        generator: see `Generators`. With one of its own, a row draws as it would alone.

    Returns:
        (B,): token ids, int64.

    Raises:
        ValueError: a setting that `check_rules` refuses.
    """
    check_rules(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = process_logits(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probabilities_BV = logits_BV.softmax(-1)
    if isinstance(generator, Sequence):
        rows = zip(probabilities_BV, generator, strict=True)
        return torch.cat([torch.multinomial(row_V, 1, generator=own) for row_V, own in rows])
    return torch.multinomial(probabilities_BV, 1, generator=generator).squeeze(-1)


def stream(
    model: Any,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    generator: Generators = None,
    attention_mask: Tensor | None = None,
    pad_token_id: int | None = None,
    suppress_mask: Tensor | None = None,
    is_stopped: Callable[[Tensor], Sequence[bool]] | None = None,
    **rules: Any,
) -> Iterator[Tensor]:
    """Write on from `input_ids`, one token per row and step, each as soon as it is chosen.

    The first step reads the whole prompt; keys and values are cached, so each later step reads one token. The model is
    in eval mode while it computes, and in the mode it had whenever the caller has control. Padding changes nothing but
    the rounding of sums, and neither do the other rows, if each row has its own generator.

    Args:
        model: a causal language model with transformers' interface and `config.max_position_embeddings`.
        input_ids: prompts, (B, T) with T at least 1; shorter ones are padded on the left.
        max_new_tokens: tokens to write per row, at least 1; T + `max_new_tokens` must fit the model.
        eos_token_id: id or ids that finish a row; None writes `max_new_tokens` in each.
        generator: see `Generators`; without effect at temperature 0.
        attention_mask: (B, T), 1 for a token, 0 for padding; None means no padding.
        pad_token_id: what a finished row is filled up with; None takes the (first) `eos_token_id`, or else 0.
        suppress_mask: (V,), True for ids never to be written, such as those that only round the vocabulary's size up.
        is_stopped: is told the (B,) new ids of every step and answers which rows end with them, for stops that are not
            one id; of a row that has ended before, neither the id nor the answer matters.
        **rules: the fields of `Rules`.

    Returns:
        An iterator over (B,) token ids, int64. It ends after `max_new_tokens` steps, or once every row is finished.

    Raises:
        ValueError: at the call itself, not at the first step: an empty prompt, one that is padded on the right, a
            length that does not fit, or a rule that `check_rules` refuses. At a step: no token is left to choose.
        FloatingPointError: at the first step, if the model's logits are no numbers.
    """
    chosen = Rules(**rules)
    check_prompt(input_ids, attention_mask)
    check_length(input_ids.size(1), max_new_tokens, model.config.max_position_embeddings)
    if isinstance(generator, Sequence) and len(generator) != len(input_ids):
        raise ValueError(f"`generator` has {len(generator)} entries for {len(input_ids)} rows. Give one per row.")
    stop_ids = stop_ids_of(eos_token_id)
    if pad_token_id is None:
        pad_token_id = stop_ids[0] if stop_ids else 0
    num_known = model.config.vocab_size if suppress_mask is None else int((~suppress_mask).sum())
    sampling = {name: getattr(chosen, name) for name in ("temperature", "top_k", "top_p", "min_p")}

    def steps() -> Iterator[Tensor]:
        ids_BT, ids_BS = input_ids, input_ids
        cache: dict[str, Any] = {}
        mask_BS = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        stop_ids_E = torch.tensor(stop_ids, dtype=torch.int64, device=input_ids.device)
        is_finished_B = torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
        for _ in range(max_new_tokens):
            logits_BV, cache = next_logits(model, ids_BT, mask_BS, cache)
            if ids_BT is input_ids:
                check_finite_logits(logits_BV)
            logits_BV = apply_history(logits_BV.float(), chosen, ids_BS, mask_BS, suppress_mask)
            # Looked at only where it can happen, because a look waits for the device.
            if chosen.no_repeat_ngram_size and ids_BS.size(1) >= num_known and (logits_BV.amax(-1) == -math.inf).any():
                raise ValueError(dead_end(chosen))
            next_B = sample_next_token(logits_BV, **sampling, generator=generator)
            next_B = next_B.masked_fill(is_finished_B, pad_token_id)
            is_finished_B = is_finished_B | torch.isin(next_B, stop_ids_E)
            if is_stopped is not None:
                is_finished_B = is_finished_B | torch.tensor(is_stopped(next_B), device=input_ids.device)
            yield next_B
            if (stop_ids or is_stopped is not None) and is_finished_B.all():
                return
            ids_BT = next_B[:, None]
            ids_BS = torch.cat([ids_BS, ids_BT], dim=1)
            mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(mask_BS), 1)], dim=1)

    return steps()


def stop_ids_of(eos_token_id: int | Sequence[int] | None) -> list[int]:
    """The ids that finish a row, as a list."""
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


@torch.no_grad()
def next_logits(model: Any, ids_BT: Tensor, mask_BS: Tensor, cache: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Let the model read `ids_BT` after what `cache` holds.

    Args:
        model: as for `stream`.
        ids_BT: tokens that the model has not seen, (B, T).
        mask_BS: 1 for a token, 0 for padding, over all tokens so far, (B, S).
        cache: the model's keys and values of the first S - T tokens, as the keyword under which it takes them; empty
            when there are none.

    Returns:
        The logits of the next token, (B, V), and the cache with `ids_BT` in it.
    """
    # Padding takes no position: a row's first token has position 0, wherever it stands.
    position_ids = (mask_BS.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.size(1) :]
    # Per call and per module, so that a loop that is left early, or frozen parts in eval mode, stay as they were.
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        output = model(
            input_ids=ids_BT,
            attention_mask=mask_BS,
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=1,
            **cache,
        )
    finally:
        for module in training:
            module.training = True
    return output.logits[:, -1], take_cache(model, output)


def take_cache(model: Any, output: Any) -> dict[str, Any]:
    """Take the cache from a model's output, under the name by which the model's next call takes it.

    transformers calls it `cache` from 5.24 on and `past_key_values` before, in outputs and in calls; but code that came
    with the weights may know only one name in calls, whatever is installed.
    """
    field = "cache" if "cache" in output else "past_key_values"
    parameters = inspect.signature(model.forward).parameters
    name = next((each for each in (field, "past_key_values", "cache") if each in parameters), field)
    return {name: output[field]}


def dead_end(rules: Rules) -> str:
    """What to say where every token is forbidden."""
    return (
        f"`no_repeat_ngram_size` ({rules.no_repeat_ngram_size}) leaves no token to go on with: each would repeat "
        "something. Raise it, or write fewer tokens."
    )


def check_finite_logits(logits_BV: Tensor) -> None:
    """Refuse a model whose logits are no numbers: the likeliest token would be the first of them.

    Raises:
        FloatingPointError: a logit is NaN.
    """
    if logits_BV.isnan().any():
        raise FloatingPointError("the model's logits are not numbers (NaN): it diverged, or its weights are damaged.")


def check_prompt(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Refuse prompts that nothing can be written after.

    Raises:
        ValueError: `input_ids` is not (B, T) with a token in it, the mask has another shape, or a row ends in padding.
    """
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"`input_ids` must be (rows, tokens) with at least one of each, got shape {tuple(input_ids.shape)}. "
            "Without a prompt, start from the end-of-text token."
        )
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, but `input_ids` has {tuple(input_ids.shape)}. "
            "Give one 1 or 0 per prompt token."
        )
    padded_rows = (attention_mask[:, -1] == 0).nonzero()[:, 0].tolist()
    if padded_rows:
        raise ValueError(
            f"`attention_mask` ends in 0 in rows {padded_rows}: the prompt is padded on the right, where the new "
            "tokens go. Pad on the left (`tokenizer.padding_side = 'left'`)."
        )


def check_length(prompt_tokens: int, max_new_tokens: int, max_position_embeddings: int) -> None:
    """Refuse to write nothing, or more than the model has positions for.

    Raises:
        ValueError: `max_new_tokens` is below 1, or prompt and new tokens together are too long.
    """
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
    if prompt_tokens + max_new_tokens > max_position_embeddings:
        raise ValueError(
            f"The prompt ({prompt_tokens} tokens) and `max_new_tokens` ({max_new_tokens}) are together longer than the "
            f"model's `max_position_embeddings` ({max_position_embeddings}). Shorten the prompt, keeping its end, or "
            f"lower `max_new_tokens`."
        )


def generate(model: Any, input_ids: Tensor, **settings: Any) -> Tensor:
    """Write on from `input_ids` and return prompt and new tokens in one tensor.

    Args:
        model: as for `stream`.
        input_ids: prompts, (B, T).
        settings: keywords of `stream`; `max_new_tokens` is required.

    Returns:
        (B, T + new): the prompts as they are, then what `stream` yields.

    Raises:
        ValueError: see `stream`.
    """
    return torch.cat([input_ids, *(next_B[:, None] for next_B in stream(model, input_ids, **settings))], dim=1)
