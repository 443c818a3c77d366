"""Decoding from scratch: from next-token logits to ids, and from ids to text.

Read top to bottom: what reshapes the logits, what picks the next token, the loop around the model, and how ids become
text while they arrive. Works with every transformers-style causal language model; beam search is not here.

Shape letters: B batch, T tokens that go into one call of the model, S tokens so far (cached + T), V vocabulary,
E ids that end a row.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

REPLACEMENT_CHARACTER = "\ufffd"
"""What a tokenizer decodes to where the bytes so far are no whole character."""

MAX_BYTES_OF_A_PART = 3
"""A UTF-8 character has at most 4 bytes, so an unfinished one has at most 3, in as many tokens."""

MAX_HELD_TOKENS = 16
"""Text that does not become whole is looked back at no further than this, so that time stays linear in length."""


def check_sampling(*, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> None:
    """Refuse settings that no distribution can be sampled with.

    Raises:
        ValueError: `temperature` is negative or not finite, `top_k` is negative, or `top_p` is not in (0, 1].
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"`temperature` must be a finite number of at least 0, got {temperature}. "
            "1 samples from the model's own distribution, 0 always takes the likeliest token."
        )
    if top_k < 0:
        raise ValueError(f"`top_k` must be at least 0, got {top_k}. 0 keeps every token.")
    if not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must be above 0 and at most 1, got {top_p}. 1 keeps every token.")


def apply_temperature(logits_BV: Tensor, temperature: float) -> Tensor:
    """Sharpen (`temperature` below 1) or flatten (above 1) the distribution of the next token.

    Args:
        logits_BV: unnormalised log-probabilities of the next token, (B, V).
        temperature: what the logits are divided by, above 0; 1 changes nothing.

    Returns:
        (B, V): the logits, divided.

    Raises:
        ValueError: `temperature` is not above 0.
    """
    check_sampling(temperature=temperature)
    if temperature == 0:
        raise ValueError("`temperature` is 0, which logits cannot be divided by. `choose_next` takes 0 as greedy.")
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
    check_sampling(top_k=top_k)
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
    check_sampling(top_p=top_p)
    if top_p == 1:
        return logits_BV
    # From the unlikeliest token up: each one sees the probability that would go if it and all below it were removed.
    # Summing from this end keeps the small probabilities exact, and cuts where transformers' TopPLogitsWarper cuts.
    sorted_BV, order_BV = logits_BV.sort()
    is_removed_BV = sorted_BV.softmax(-1).cumsum(-1) <= 1 - top_p
    is_removed_BV[:, -1] = False
    return logits_BV.masked_fill(is_removed_BV.scatter(-1, order_BV, is_removed_BV), -math.inf)


def choose_next(
    logits_BV: Tensor, *, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """Pick the next token of every row: the likeliest at temperature 0, otherwise a sample.

    Args:
        logits_BV: unnormalised log-probabilities of the next token, (B, V), in any floating-point type.
        temperature: at least 0; 0 is greedy, and then nothing below has an effect.
        top_k: see `filter_top_k`; applied after the temperature.
        top_p: see `filter_top_p`; applied after `top_k`.
        generator: random numbers of the logits' device; None takes torch's default ones.

    Returns:
        (B,): token ids, int64.

    Raises:
        ValueError: a setting that `check_sampling` refuses.
    """
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    if temperature == 0:
        return logits_BV.argmax(-1)
    # In bf16 the probabilities of a large vocabulary would not sum to 1.
    logits_BV = apply_temperature(logits_BV.float(), temperature)
    logits_BV = filter_top_p(filter_top_k(logits_BV, top_k), top_p)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator).squeeze(-1)


def stream(
    model: Any,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    attention_mask: Tensor | None = None,
    pad_token_id: int | None = None,
) -> Iterator[Tensor]:
    """Write on from `input_ids`, one token per row and step, each as soon as it is chosen.

    The first step reads the whole prompt; keys and values are cached, so each later step reads one token. The model is
    in eval mode while it computes, and in the mode it had whenever the caller has control.

    Args:
        model: a causal language model with transformers' interface and `config.max_position_embeddings`.
        input_ids: prompts, (B, T) with T at least 1; shorter ones are padded on the left.
        max_new_tokens: tokens to write per row, at least 1; T + `max_new_tokens` must fit the model.
        temperature: at least 0; 0 is greedy, and then `top_k`, `top_p` and `generator` have no effect.
        top_k: number of likeliest tokens to sample from; 0 is all of them.
        top_p: probability of the likeliest tokens to sample from, in (0, 1]; 1 is all of them.
        eos_token_id: id or ids that finish a row; None writes `max_new_tokens` in each.
        generator: random numbers of the model's device; None takes torch's default ones.
        attention_mask: (B, T), 1 for a token, 0 for padding; None means no padding.
        pad_token_id: what a finished row is filled up with; None takes the (first) `eos_token_id`.

    Returns:
        An iterator over (B,) token ids, int64. It ends after `max_new_tokens` steps, or once every row is finished.

    Raises:
        ValueError: at the call itself, not at the first step: an empty prompt, one that is padded on the right, a
            length that does not fit, or a setting that `check_sampling` refuses.
    """
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    check_prompt(input_ids, attention_mask)
    check_length(input_ids.size(1), max_new_tokens, model.config.max_position_embeddings)
    if eos_token_id is None:
        stop_ids = []
    else:
        stop_ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    if pad_token_id is None:
        pad_token_id = stop_ids[0] if stop_ids else 0  # without stop ids no row finishes, and nothing is filled up

    def steps() -> Iterator[Tensor]:
        ids_BT, past_key_values = input_ids, None
        mask_BS = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        stop_ids_E = torch.tensor(stop_ids, dtype=torch.int64, device=input_ids.device)
        is_finished_B = torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
        for _ in range(max_new_tokens):
            logits_BV, past_key_values = next_logits(model, ids_BT, mask_BS, past_key_values)
            next_B = choose_next(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            next_B = next_B.masked_fill(is_finished_B, pad_token_id)
            is_finished_B = is_finished_B | torch.isin(next_B, stop_ids_E)
            yield next_B
            if stop_ids and is_finished_B.all():
                return
            ids_BT = next_B[:, None]
            mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(mask_BS), 1)], dim=1)

    return steps()


@torch.no_grad()
def next_logits(model: Any, ids_BT: Tensor, mask_BS: Tensor, past_key_values: Any) -> tuple[Tensor, Any]:
    """Let the model read `ids_BT` after what `past_key_values` holds.

    Args:
        model: as for `stream`.
        ids_BT: tokens that the model has not seen, (B, T).
        mask_BS: 1 for a token, 0 for padding, over all tokens so far, (B, S).
        past_key_values: the cache of the first S - T tokens; None when there are none.

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
            past_key_values=past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )
    finally:
        for module in training:
            module.training = True
    return output.logits[:, -1], output.past_key_values


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


def stream_text(tokenizer: Any, token_ids: Iterable[int | Tensor]) -> Iterator[str]:
    """Turn the ids of one row into pieces of text, each as soon as it consists of whole characters.

    A Korean syllable or an emoji may be split over tokens; its parts are held back until it is complete. The pieces
    joined are `tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)`: for byte-level BPE
    always, for SentencePiece's byte fallback where the bytes are valid UTF-8. Takes time linear in the number of ids.

    Args:
        tokenizer: has transformers' `decode`.
        token_ids: ids of one row, as int or as tensors of one element: what `stream` yields for one prompt fits.

    Yields:
        Pieces of text, none of them empty.
    """

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # The window starts with tokens whose text is out already, `shown` characters of it: SentencePiece tokenizers drop
    # the space before the very first token they are given, so a token's own text shows only after another one.
    window: list[int] = []
    new_from, shown = 0, 0
    for token_id in map(int, token_ids):
        # Special tokens and ids outside the vocabulary have no text. Asked twice over, because a single
        # SentencePiece space has none either.
        if not decode([token_id, token_id]):
            continue
        window.append(token_id)
        text = decode(window)
        if len(text) > shown and not text.endswith(REPLACEMENT_CHARACTER):
            yield text[shown:]
            window = window[new_from:]
            new_from, shown = len(window), len(decode(window))
        elif len(window) > MAX_HELD_TOKENS:
            # These bytes are no text, or the text is a row of real U+FFFD. Only the last one can still change.
            if len(text) - 1 > shown:
                yield text[shown:-1]
            window = window[-MAX_BYTES_OF_A_PART:]
            new_from, shown = 0, len(decode(window)) - 1
    rest = decode(window)[shown:]
    if rest:
        yield rest
