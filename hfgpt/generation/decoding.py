"""Decoding from scratch: from the logits of the next token to that token, and the loop around the model.

Read top to bottom: the order in which the rules of logits.py apply, what picks the next token, the loop, and the checks
of its input. It works with every causal language model of transformers' interface, and knows no tokenizer.

Shape letters: B batch, T tokens that go into one call of the model, S tokens so far (cached + T), V vocabulary,
E ids that end a row.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hfgpt.generation.cpu_step import OneTokenStep, is_plain
from hfgpt.generation.logits import (
    apply_temperature,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    forbid_repeated_ngrams,
    penalize_repetition,
)
from hfgpt.generation.params import SamplingParams

Generators = torch.Generator | Sequence[torch.Generator] | None
"""Random numbers of the logits' device: of all rows together, of each row its own, or, with None, torch's own."""


def apply_history(
    logits_BV: Tensor,
    params: SamplingParams,
    ids_BS: Tensor,
    mask_BS: Tensor | None = None,
    suppress_V: Tensor | None = None,
) -> Tensor:
    """Apply the rules about earlier tokens, and forbid ids that the tokenizer does not know.

    Args:
        logits_BV: unnormalised log-probabilities of the next token, (B, V).
        params: of which only the rules about earlier tokens matter.
        ids_BS: tokens so far, (B, S).
        mask_BS: (B, S), 0 where a token is padding; None where there is none.
        suppress_V: (V,), True for ids that are in the model's vocabulary only to round its size up.

    Returns:
        (B, V): the logits; the tokens forbidden have -inf, which may be all.
    """
    if suppress_V is not None:
        logits_BV = logits_BV.masked_fill(suppress_V, -math.inf)
    if params.repetition_penalty != 1:
        logits_BV = penalize_repetition(logits_BV, ids_BS, params.repetition_penalty, mask_BS)
    return forbid_repeated_ngrams(logits_BV, ids_BS, params.no_repeat_ngram_size, mask_BS)


def process_logits(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """Apply the temperature, then `top_k`, `top_p` and `min_p`, in transformers' order.

    Args:
        logits_BV: unnormalised log-probabilities of the next token, (B, V), in any floating-point type.
        params: of which only the rules about the distribution matter; temperature 0 leaves the likeliest token alone.

    Returns:
        (B, V): fp32 logits, of which the softmax is sampled from.
    """
    logits_BV = logits_BV.float()  # in bf16 the probabilities of a large vocabulary would not sum to 1
    if params.temperature == 0:
        best_B1 = logits_BV.argmax(-1, keepdim=True)
        return torch.full_like(logits_BV, -math.inf).scatter(-1, best_B1, 0.0)
    logits_BV = apply_temperature(logits_BV, params.temperature)
    logits_BV = filter_top_k(logits_BV, params.top_k)
    logits_BV = filter_top_p(logits_BV, params.top_p)
    return filter_min_p(logits_BV, params.min_p)


def sample_next_token(logits_BV: Tensor, params: SamplingParams, generator: Generators = None) -> Tensor:
    """Pick the next token of every row: the likeliest at temperature 0, otherwise a sample.

    Args:
        logits_BV: unnormalised log-probabilities of the next token, (B, V), in any floating-point type.
        params: see `process_logits`.
        generator: see `Generators`. With one of its own, a row draws as it would alone.

    Returns:
        (B,): token ids, int64.
    """
    if params.temperature == 0:
        return logits_BV.argmax(-1)
    probabilities_BV = process_logits(logits_BV, params).softmax(-1)
    if isinstance(generator, Sequence):
        rows = zip(probabilities_BV, generator, strict=True)
        return torch.cat([torch.multinomial(row_V, 1, generator=own) for row_V, own in rows])
    return torch.multinomial(probabilities_BV, 1, generator=generator).squeeze(-1)


def generate(model: Any, input_ids: Tensor, params: SamplingParams, **inputs: Any) -> Tensor:
    """Continue `input_ids`, and return prompt and new tokens in one tensor.

    `generate(model, input_ids, SamplingParams(max_new_tokens=40, temperature=0.8, top_k=50))`

    Args:
        model: see `generate_stream`, as for what is raised.
        input_ids: prompts, (B, T).
        params: how.
        **inputs: further arguments of `generate_stream`.

    Returns:
        (B, T + new): the prompts as they are, then what `generate_stream` yields.
    """
    new_tokens = generate_stream(model, input_ids, params, **inputs)
    return torch.cat([input_ids, *(next_B[:, None] for next_B in new_tokens)], dim=1)


def generate_stream(
    model: Any,
    input_ids: Tensor,
    params: SamplingParams,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    generator: Generators = None,
    attention_mask: Tensor | None = None,
    pad_token_id: int | None = None,
    suppress_mask: Tensor | None = None,
    is_stopped: Callable[[Tensor], Sequence[bool]] | None = None,
) -> Iterator[Tensor]:
    """Continue `input_ids`, one token per row and step, each as soon as it is chosen.

    The first step reads the whole prompt; keys and values are cached, so each later step reads one token, on a CPU by
    `OneTokenStep` where `is_plain` allows it: its modules then have to stay as they are until the end. The model is in
    eval mode while it computes, and in the mode it had whenever the caller has control. Padding changes nothing but
    the rounding of sums, and neither do the other rows, if each row has its own generator.

    Args:
        model: a causal language model with transformers' interface and `config.max_position_embeddings`.
        input_ids: prompts, (B, T) with T at least 1; shorter ones are padded on the left.
        params: how. T + `max_new_tokens` must fit the model; `seed` is used if there is no `generator`.
        eos_token_id: id or ids that finish a row; None writes `max_new_tokens` in each.
        generator: see `Generators`; without effect at temperature 0.
        attention_mask: (B, T), 1 for a token, 0 for padding; None means no padding.
        pad_token_id: what a finished row is filled up with; None takes the (first) `eos_token_id`, or else 0.
        suppress_mask: (V,), True for ids never to be written, such as those that only round the vocabulary's size up.
        is_stopped: is given the (B,) new ids of every step and returns which rows end with them, for stops that are not
            one id; of a row that has ended before, neither the id nor the answer matters.

    Returns:
        An iterator over (B,) token ids, int64. It ends after `max_new_tokens` steps, or once every row is finished.

    Raises:
        ValueError: at the call itself, not at the first step: an empty prompt, one that is padded on the right, a
            length that does not fit, or params that this function cannot follow. At a step: no token is left to choose.
        FloatingPointError: at the first step, if the model's logits are no numbers.
    """
    if params.num_beams > 1:
        raise ValueError(f"`num_beams` ({params.num_beams}) is above 1: that is what `beam_search` is for.")
    check_stop(params, is_stopped)
    check_prompt(input_ids, attention_mask)
    check_length(input_ids.size(1), params.max_new_tokens, model.config.max_position_embeddings)
    if isinstance(generator, Sequence) and len(generator) != len(input_ids):
        raise ValueError(f"`generator` has {len(generator)} entries for {len(input_ids)} rows. Give one per row.")
    if generator is None and params.seed is not None:
        generator = torch.Generator(input_ids.device).manual_seed(params.seed)
    stop_ids = stop_ids_of(eos_token_id)
    if pad_token_id is None:
        pad_token_id = stop_ids[0] if stop_ids else 0
    prompt_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if input_ids.is_cuda:
        from hfgpt.generation import cuda_graph  # where there is a GPU: Triton is slow to import

        if cuda_graph.can_capture(model, params):
            return cuda_graph.generate_with_graph(
                model,
                input_ids,
                params,
                prompt_mask,
                stop_ids=stop_ids,
                generator=generator,
                pad_token_id=pad_token_id,
                suppress_mask=suppress_mask,
                is_stopped=is_stopped,
            )
    num_known = model.config.vocab_size if suppress_mask is None else int((~suppress_mask).sum())

    def steps() -> Iterator[Tensor]:
        ids_BT, ids_BS = input_ids, input_ids
        cache: dict[str, Any] = {}
        mask_BS = prompt_mask
        stop_ids_E = torch.tensor(stop_ids, dtype=torch.int64, device=input_ids.device)
        is_finished_B = torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
        step: OneTokenStep | None = None
        for _ in range(params.max_new_tokens):
            if step is None:
                logits_BV, cache = next_logits(model, ids_BT, mask_BS, cache)
            else:
                logits_BV = step(ids_BT[:, 0])
            if ids_BT is input_ids:
                check_finite_logits(logits_BV)
                if is_plain(model, "cpu"):
                    (read,), cache = cache.values(), {}
                    step = OneTokenStep(model, read, mask_BS, input_ids.size(1) + params.max_new_tokens)
            logits_BV = apply_history(logits_BV.float(), params, ids_BS, mask_BS, suppress_mask)
            # Checked only where it can happen, because the check waits for the device.
            if params.no_repeat_ngram_size and ids_BS.size(1) >= num_known and (logits_BV.amax(-1) == -math.inf).any():
                raise ValueError(no_token_left(params))
            next_B = sample_next_token(logits_BV, params, generator)
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
        model: as for `generate_stream`.
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


def no_token_left(params: SamplingParams) -> str:
    """The message where every token is forbidden."""
    return (
        f"`no_repeat_ngram_size` ({params.no_repeat_ngram_size}) leaves no token to go on with: each would repeat "
        "something. Raise it, or write fewer tokens."
    )


def check_stop(params: SamplingParams, is_stopped: Callable[..., Any] | None) -> None:
    """Refuse (ValueError) stop texts that nothing looks for."""
    if params.stop and is_stopped is None:
        raise ValueError(f"`stop` {list(params.stop)} needs a tokenizer. Use `generate_texts`, or give `is_stopped`.")


def check_finite_logits(logits_BV: Tensor) -> None:
    """Refuse (FloatingPointError) a model whose logits are no numbers."""
    if logits_BV.isnan().any():
        raise FloatingPointError("the model's logits are not numbers (NaN): it diverged, or its weights are damaged.")


def check_prompt(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Refuse (ValueError) what is not (B, T) with T at least 1, a mask of another shape, and padding on the right."""
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
    """Refuse (ValueError) more tokens than the model has positions for."""
    if prompt_tokens + max_new_tokens > max_position_embeddings:
        raise ValueError(
            f"The prompt ({prompt_tokens} tokens) and `max_new_tokens` ({max_new_tokens}) are together longer than the "
            f"model's `max_position_embeddings` ({max_position_embeddings}). Shorten the prompt, keeping its end, or "
            f"lower `max_new_tokens`."
        )
