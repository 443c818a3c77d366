"""A model's config made small, so that everything about the model can be tried in seconds."""

import copy
import re
from typing import Any

from transformers import PreTrainedConfig

SMALL: dict[str, tuple[int, tuple[str, ...]]] = {
    "hidden_size": (32, ("n_embd", "d_model", "n_embed", "embed_dim", "emb_dim", "embedding_size", "dim", "width")),
    "num_hidden_layers": (2, ("n_layer", "n_layers", "num_layers", "depth")),
    "num_attention_heads": (4, ("n_head", "n_heads", "num_heads")),
    "num_key_value_heads": (2, ("n_kv_head", "n_kv_heads", "num_kv_heads", "kv_heads", "n_kv_groups", "num_kv_groups")),
    "head_dim": (8, ("head_size", "d_head")),
    "rotary_dim": (4, ()),
    "intermediate_size": (64, ("n_inner", "ffn_dim", "d_ff", "hidden_dim", "ffn_hidden_size", "mlp_dim", "d_ffn")),
    "vocab_size": (128, ("n_vocab",)),
    "max_position_embeddings": (
        64,
        ("n_positions", "n_ctx", "block_size", "context_length", "max_seq_len", "max_seq_length", "seq_len", "ctx_len"),
    ),
    "num_local_experts": (4, ("num_experts", "n_routed_experts")),
    "num_experts_per_tok": (2, ("top_k_experts",)),
    "moe_intermediate_size": (16, ()),
}
"""Sizes by transformers' name: what they become, and other names that people give them."""

TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
"""Ids that a small vocabulary has; no text ends before it is as long as was asked for."""


def small_values(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a config to change, with their small values: sizes that are larger, and ids outside the vocabulary.

    Heads that share keys and values go on doing so; a list with a kind for each layer keeps each kind.
    """
    values = config.to_dict()
    known = {**values, **{name: getattr(config, name, None) for name in config.attribute_map}}
    changes: dict[str, Any] = {}
    for name, (size, others) in SMALL.items():
        for each in (name, *others):
            if isinstance(known.get(each), int) and known[each] > size:
                changes[config.attribute_map.get(each, each)] = size
    if _size(config, "num_key_value_heads") == _size(config, "num_attention_heads"):
        changes |= {name: SMALL["num_attention_heads"][0] for name in _names("num_key_value_heads") if name in changes}
    layers = SMALL["num_hidden_layers"][0]
    for name, value in values.items():
        if isinstance(value, list) and len(value) == _size(config, "num_hidden_layers") and len(value) > layers:
            kinds = [kind for place, kind in enumerate(value) if kind not in value[:place]]
            changes[name] = (kinds + value)[:layers]
    return changes | {name: value for name, value in TOKEN_IDS.items() if name in values}


def changed_config(config: PreTrainedConfig, changes: dict[str, Any]) -> PreTrainedConfig:
    """A copy of a config with other values, built by its class, so that what it derives from them is derived anew."""
    values = {**copy.deepcopy(config.to_dict()), **changes}
    for name in ("transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype"):
        values.pop(name, None)
    return type(config).from_dict(values)


def _names(field: str) -> tuple[str, ...]:
    return (field, *SMALL[field][1])


def _size(config: PreTrainedConfig, field: str) -> int | None:
    """A size under whichever name a config has it."""
    return next((getattr(config, name) for name in _names(field) if getattr(config, name, None) is not None), None)


def size_of(config: PreTrainedConfig, field: str, default: int) -> int:
    """A size, by transformers' name, under whichever name a config has it; `default` if it has none."""
    found = _size(config, field)
    return default if found is None else found


def dropout_fields(config: PreTrainedConfig) -> list[str]:
    """The fields that hold the probability of a dropout inside the language model."""
    return [
        name
        for name, value in config.to_dict().items()
        if re.search(r"dropout|pdrop$|(^|_)drop(_|$)", name)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and not name.startswith(("classifier", "summary"))
    ]
