"""Which arguments a forward pass takes, and what the installed transformers calls its cache.

This file travels to the Hub with the weights, so it imports nothing but transformers.
"""

import difflib
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from inspect import Parameter, signature
from typing import Any

from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

logger = logging.get_logger(__name__)
logger.addFilter(lambda record: record.levelno >= logging.get_verbosity())  # transformers.logging.set_verbosity_error()

(CACHE,) = {field.name for field in fields(BaseModelOutputWithPast)} & {"cache", "past_key_values"}
"""The name of the cache in calls and outputs: `past_key_values` in transformers 5.23, `cache` from 5.24 on."""

KNOWN_ARGUMENTS = frozenset(
    # transformers.utils.TransformersKwargs; the decorators of transformers.utils.generic; `ModelOutput`
    "num_items_in_batch output_hidden_states output_attentions output_router_logits position_ids is_causal seq_idx "
    "debug_io debug_io_dir prune_layers return_dict "
    # transformers.modeling_flash_attention_utils, transformers.integrations.flex_attention
    "cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k deterministic kernel_options "
    # transformers.generation.utils, `_extract_generation_mode_kwargs`
    "tokenizer assistant_tokenizer assistant_model streamer "
    # transformers.generation.continuous_batching.input_outputs.PagedAttentionArgs
    "cache read_index write_index block_table logits_indices logits_processor_args".split()
)
"""What transformers hands to a model's forward pass besides the arguments in its signature."""


def take_cache(past_key_values: Cache | None, cache: Any, kwargs: dict[str, Any]) -> Any:
    """Find the model's own cache, under whichever name it came.

    Up to transformers 5.23 `cache` is continuous batching's, and meant for the attention function: that one is put into
    `kwargs`, which go there.

    Raises:
        ValueError: there is one under each name.
    """
    if CACHE != "cache" and cache is not None and not isinstance(cache, Cache):
        kwargs["cache"] = cache
        return past_key_values
    if past_key_values is not None and cache is not None:
        raise ValueError("`past_key_values` and `cache` are two names of one argument. Give one of them.")
    return cache if past_key_values is None else past_key_values


def with_both_cache_names(forward: Callable) -> Callable:
    """Let a forward pass of transformers take its cache under either name, and show both in its signature."""
    parameters = dict(signature(forward).parameters)
    for name in ("cache", "past_key_values"):
        parameters.setdefault(name, Parameter(name, Parameter.KEYWORD_ONLY, default=None))

    @wraps(forward)
    def wrapper(self, *args, past_key_values: Cache | None = None, cache: Any = None, **kwargs):
        own = take_cache(past_key_values, cache, kwargs)
        return forward(self, *args, **({} if own is None else {CACHE: own}), **kwargs)

    wrapper.__signature__ = signature(forward).replace(  # type: ignore[attr-defined]
        parameters=sorted(parameters.values(), key=lambda parameter: parameter.kind)
    )
    return wrapper


def own_arguments(kwargs: dict[str, Any]) -> list[str]:
    """The arguments that mean something to the attention function alone; vLLM and others have some."""
    return [name for name, value in kwargs.items() if value is not None and name not in KNOWN_ARGUMENTS]


def check_arguments(kwargs: dict[str, Any], attend: Callable, forward: Callable) -> None:
    """Refuse what nothing would read: a misspelt argument, or one that changes another model's logits.

    An attention function that does not come with transformers, or with hfgpt, may read any argument.

    Args:
        kwargs: what `forward` was given besides the arguments in its signature.
        attend: the attention function in use.
        forward: the model's, for the names that may have been meant.

    Raises:
        TypeError: naming the argument and the nearest one that there is.
    """
    unknown = own_arguments(kwargs)
    if not unknown:
        return
    package = attend.__module__.partition(".")[0]
    if package not in ("transformers", __name__.partition(".")[0]):
        return
    unknown = [name for name in unknown if name not in signature(attend).parameters]
    for name in unknown:
        candidates = KNOWN_ARGUMENTS | (signature(forward).parameters.keys() - {"self", "kwargs"})
        nearest = difflib.get_close_matches(name, candidates, n=1)
        hint = f" Did you mean `{nearest[0]}`?" if nearest else ""
        raise TypeError(f"forward() got an argument that nothing reads, `{name}`.{hint}")


def withhold_cache(cache: Cache | None) -> None:
    """Use no cache while activations are checkpointed: the backward pass computes each block, and would fill it, again.

    Raises:
        ValueError: the cache holds tokens.
    """
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            "a cache that holds tokens cannot be read while activations are checkpointed. Give all tokens at once, or "
            "turn gradient checkpointing off."
        )
    if cache is not None:
        logger.warning_once("The cache stays empty: it does not go together with gradient checkpointing.")
