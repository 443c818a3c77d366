"""Where each token stands in its text, and which of the texts in one row it belongs to.

Shape letters: B batch, T query positions, S key positions (cached + T), C model width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.utils.import_utils import is_jit_tracing, is_tracing

from .arguments import own_arguments


def count_positions(x_BTC: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
    """Number the tokens from 0, padding left out: (1, T), or (B, T) where a mask says what padding is."""
    length = x_BTC.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
    past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
    return torch.arange(length, device=x_BTC.device)[None] + past_length


def is_only_causal(
    config: Any, attention_mask: Tensor | None, past_key_values: Cache | None, documents_BS: Tensor | None
) -> bool:
    """Whether torch's own attention needs no mask: whole rows without padding, each one document.

    transformers sees that too, but torch 2.11 tells it that every compilation is an export, and then it makes a mask as
    large as the scores, which attention reads at less than half its speed on a GPU.
    """
    is_whole = attention_mask is None and past_key_values is None and documents_BS is None
    is_torchs = config._attn_implementation == "sdpa" and getattr(config, "is_causal", True)
    return is_whole and is_torchs and not torch.compiler._is_exporting_flag


def find_documents(
    implementation: str,
    x_BTC: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Number the documents that are packed into each row: (B, S), or None if every row is one document.

    Raises:
        ValueError: there are several, or padding, and the attention implementation would not know of it. What is traced
            cannot be looked at, and gets an assertion in its place.
    """
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
    if make_mask is None and attention_mask is not None and attention_mask.ndim == 2:
        check_not(
            (attention_mask == 0).any(),
            f"the attention implementation {implementation!r} has no mask function, so it would not see the "
            "padding. Register one with `AttentionMaskInterface.register`.",
        )
    if position_ids is None:
        if kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError("`cu_seq_lens_q` packs documents; give `position_ids` that start again with each.")
        return None
    if attention_mask is not None and attention_mask.ndim == 4:
        return None  # the mask itself separates documents
    if is_paged(past_key_values) or is_paged(kwargs.get("cache")):
        return None  # one row of all requests, whose places in the cache keep them apart
    if make_mask is None and own_arguments(kwargs):
        return None  # vLLM and others hand their attention what keeps the requests in one row apart
    past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
    if not (isinstance(past_length, int) and past_length == 0):
        return None
    starts_BT = find_starts(position_ids.expand(x_BTC.shape[0], -1), attention_mask)
    if not is_tracing(starts_BT) and not starts_BT.any():
        return None

    if kwargs.get("cu_seq_lens_q") is None and make_mask in (None, flash_attention_mask):
        are_mixed_up = starts_BT.any()
        if make_mask is flash_attention_mask and x_BTC.shape[0] == 1:
            # It goes by the positions, but only those of a single row without padding.
            has_padding = torch.zeros_like(are_mixed_up) if attention_mask is None else (attention_mask == 0).any()
            are_mixed_up = are_mixed_up & has_padding
        check_not(
            are_mixed_up,
            f"`position_ids` start again within a row, and the attention implementation {implementation!r} would "
            "let those documents see each other. Use 'sdpa', 'eager' or 'flex_attention', or flatten the batch to "
            "one row without padding, as transformers' DataCollatorWithFlattening does.",
        )
    # A static cache has more places than there are tokens yet.
    length = starts_BT.shape[1]
    places = length if past_key_values is None else past_key_values.get_mask_sizes(length, 0)[0]
    return F.pad(starts_BT.cumsum(dim=-1), (0, places - length), value=-1)


def check_not(is_wrong: Tensor, message: str) -> None:
    """Raise ValueError(message) if `is_wrong`, a tensor of one bool; a compiled graph asserts it when it runs."""
    if is_tracing(is_wrong) and not is_jit_tracing():  # a trace of torch.jit has values, and drops assertions
        torch._assert_async(~is_wrong, message)
    elif is_wrong:
        raise ValueError(message)


def is_paged(cache: Any) -> bool:
    """Whether this is continuous batching's cache, which does not say how much it holds; it is no `Cache`."""
    return cache is not None and not isinstance(cache, Cache)


def find_starts(position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Find the tokens with which another document than the row's first begins: (B, T) bool.

    Those are the tokens whose position is not one more than that of the last token before them, padding left out: so
    that neither padding nor the positions that `generate` gives to it look like a document.
    """
    if attention_mask is None:
        return F.pad(position_ids.diff(dim=-1) != 1, (1, 0))
    is_token_BT = attention_mask[:, -position_ids.shape[1] :] != 0
    places_T = torch.arange(position_ids.shape[1], device=position_ids.device)
    last_token_BT = torch.where(is_token_BT, places_T, -1).cummax(dim=-1).values
    before_BT = F.pad(last_token_BT[:, :-1], (1, 0), value=-1)
    goes_on_BT = position_ids == position_ids.gather(-1, before_BT.clamp(min=0)) + 1
    return is_token_BT & (before_BT >= 0) & ~goes_on_BT


def check_positions_exist(position_ids: Tensor, past_key_values: Cache | None, limit: int) -> None:
    """Raise an error where the embedding would raise an IndexError, or on a GPU end the process.

    On a GPU the positions themselves are read only if the sequence, padding included, may be too long: reading them
    makes the GPU wait.
    """
    length = position_ids.shape[-1]
    if past_key_values is not None and not is_paged(past_key_values):
        past_length = past_key_values.get_seq_length()
        # A static cache counts on the device; what is known of its length is how long it can become.
        is_counted = isinstance(past_length, int)
        length = past_length + length if is_counted else past_key_values.get_max_length()
    may_be_too_long = length > limit
    if is_tracing(position_ids):
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # not above: it imports sympy, a slow one

        # A length of which the ONNX export of torch 2.11 may know nothing counts as short. A trace of torch.jit drops
        # assertions, and its lengths are this input's alone: there the embedding itself refuses, as on every CPU.
        if not is_jit_tracing() and guard_or_false(may_be_too_long):
            torch._assert_async(
                position_ids.max() < limit, f"the sequence is longer than `max_position_embeddings` ({limit})."
            )
    elif may_be_too_long or position_ids.device.type == "cpu":
        tokens = int(position_ids.max()) + 1
        if tokens > limit:
            raise ValueError(
                f"the sequence has {tokens} tokens, the model `max_position_embeddings` ({limit}): there is no "
                "position for the rest. Shorten the prompt, or generate fewer tokens."
            )
