"""`HFGPTConfig`: the shape of a GPT, in transformers' words, with GPT-2's names as aliases.

This file travels to the Hub with the weights, so it imports nothing but transformers and what that needs.
"""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import transformers
from packaging.version import Version

# Before all that an older transformers does not have: whoever opens a folder by its own code may have any.
if Version(transformers.__version__) < Version("5.23"):
    raise ImportError(
        f"hfgpt's models need transformers 5.23 or newer; {transformers.__version__} is installed. Run `pip install "
        "--upgrade transformers`."
    )

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)
logger.addFilter(lambda record: record.levelno >= logging.get_verbosity())  # transformers.logging.set_verbosity_error()

GPT2_SOURCE = "hfgpt-gpt2-import"
"""`model_type` of a config read from a GPT-2 config.json, until its weights are loaded.

transformers looks weight conversions up by `config.model_type`. A private key, so that hfgpt's own files are never
converted and transformers' own GPT-2 is never touched.
"""

# What GPT-2 reads from a config.json that names no value, as transformers' GPT2Config does.
GPT2_TOKEN_IDS = {"bos_token_id": 50256, "eos_token_id": 50256}

# GPT-2 options that change the mathematics and are not built here, with the one value that leaves it as it is.
UNSUPPORTED_OPTIONS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}

# What transformers, vLLM and others act upon in any config, and the double head of GPT-2: it is not taken from a file.
IGNORED_KEYS = frozenset(
    "sliding_window attention_chunk_size layer_types is_causal head_dim rope_parameters rope_scaling rope_theta "
    "attn_logit_softcapping final_logit_softcapping logit_scale kv_sharing_modes compile_config distributed_config "
    "fusion_config gradient_checkpointing transformers_weights "
    "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout".split()
)

DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})
"""Numbers that weights come in."""

# What transformers itself passes to a config's constructor besides the declared fields.
TRANSFORMERS_KEYS = frozenset(
    "model_type auto_map num_labels torch_dtype attn_implementation _attn_implementation experts_implementation "
    "output_attentions name_or_path _name_or_path _commit_hash per_layer_config quantization_config "
    "_attn_implementation_internal _experts_implementation_internal _attn_implementation_autoset".split()
)


@strict
class HFGPTConfig(PreTrainedConfig):
    """The shape and the regularisation of an hfgpt model; the defaults are GPT-2 small (124M).

    Every field may also be given under GPT-2's name (`n_embd`, `n_layer`, `n_head`, `n_inner`, `n_positions`,
    `n_ctx`). Unknown names, and a field that contradicts its alias, are refused.

    Args:
        vocab_size: number of token ids, at least 1.
        max_position_embeddings: longest sequence in tokens; positions are learned.
        hidden_size: width of the residual stream; a multiple of `num_attention_heads`.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads of each attention.
        intermediate_size: width inside the MLP; None means 4 x `hidden_size`.
        activation_function: the MLP's activation, a key of `hfgpt.gpt.ACTIVATIONS`.
        resid_pdrop: dropout after each projection into the residual stream, in [0, 1].
        embd_pdrop: dropout on the sum of token and position embeddings, in [0, 1].
        attn_pdrop: dropout on the attention probabilities, in [0, 1].
        classifier_dropout: dropout before the head of `HFGPTForTokenClassification`, in [0, 1].
        layer_norm_epsilon: added to the variance in every LayerNorm.
        initializer_range: standard deviation of the initial weights, see `hfgpt.gpt.init_std`.
        use_cache: whether a forward pass keeps keys and values for the next one.
        bos_token_id: id that starts a text, or None.
        eos_token_id: id or ids that end a generated text, or None.
        pad_token_id: id that fills short rows, or None.
        tie_word_embeddings: whether the output layer shares the token embedding's matrix, as in GPT-2.

    Raises:
        ValueError: an unknown field, a field and its alias with different values, or an impossible shape.

    Source:
        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
    """

    model_type = "hfgpt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # the names of transformers 5.23 and 5.24
    attribute_map = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "num_key_value_heads": "num_attention_heads",  # TGI reads it; no two heads share their keys
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
        "n_ctx": "max_position_embeddings",
    }
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    # vLLM and SGLang cut a model into stages by it: each module's inputs and outputs.
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "embed_positions": (["inputs_embeds", "position_ids"], ["hidden_states"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    base_model_fsdp_plan = {
        "embed_tokens": "free_full_weight",
        "embed_positions": "free_full_weight",
        "layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }

    vocab_size: int = 50257
    max_position_embeddings: int = 1024
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float | int = 0.1
    embd_pdrop: float | int = 0.1
    attn_pdrop: float | int = 0.1
    classifier_dropout: float | int = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __init__(self, **kwargs: Any) -> None:
        foreign = kwargs.pop("foreign_keys", {})
        kwargs = canonical_fields(kwargs)
        known = {field.name for field in fields(self)} | TRANSFORMERS_KEYS
        for name in kwargs:
            if name not in known:
                raise ValueError(unknown_field_message(name))
        # As transformers' generated constructor does: handed up as keywords, `use_cache` would be taken for a setting
        # of generation and dropped.
        for name in HFGPTConfig.__annotations__:
            setattr(self, name, kwargs.pop(name, getattr(HFGPTConfig, name)))
        super().__init__(**kwargs, **foreign)
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Refuse shapes that cannot be built.

        Raises:
            ValueError: a size below 1, a dropout outside [0, 1], or heads that do not divide the width.
        """
        sizes = ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise ValueError(f"`intermediate_size` must be at least 1, got {self.intermediate_size}.")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` (`n_embd`, {self.hidden_size}) is not divisible by `num_attention_heads` "
                f"(`n_head`, {self.num_attention_heads}). Each head needs the same width."
            )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read config.json; a GPT-2 one is marked as such, without transformers' warning about another model type."""
        config_dict, unused_kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return from_gpt2_fields(config_dict), unused_kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """Build a config from a config.json, hfgpt's or GPT-2's.

        Keys of other tools, such as a note, are kept, with a warning; settings of generation are dropped, as
        transformers does, and `IGNORED_KEYS`.

        Raises:
            ValueError: the file is of another architecture, or turns on mathematics that hfgpt does not have.
        """
        config_dict = canonical_fields(from_gpt2_fields(config_dict))
        source = config_dict.pop("hfgpt_source", None)
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"`model_type` is {config_dict['model_type']!r}; hfgpt reads {cls.model_type!r} and 'gpt2' configs."
            )
        for name, harmless in UNSUPPORTED_OPTIONS.items():
            if config_dict.pop(name, harmless) != harmless:
                raise ValueError(f"`{name}` must be {harmless}: hfgpt does not build what {not harmless} asks for.")
        for name in ("dtype", "torch_dtype"):
            dtype = config_dict.get(name)
            if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
                raise ValueError(f"`{name}` must be one of {sorted(DTYPES)}, got {dtype!r}.")
        known = {field.name for field in fields(cls)} | TRANSFORMERS_KEYS
        foreign = {key: config_dict.pop(key) for key in sorted(set(config_dict) - known)}
        kept = {key: value for key, value in foreign.items() if key not in IGNORED_KEYS and not hasattr(cls, key)}
        if foreign:
            ignored = ", ".join(key for key in foreign if key not in kept)
            logger.warning(
                f"Keys of config.json that hfgpt has no use for: {', '.join(foreign)}."
                + (f" Ignored of them: {ignored}." if ignored else "")
            )
        result = super().from_dict({**config_dict, "foreign_keys": kept}, **kwargs)
        if source is not None:
            config = result[0] if isinstance(result, tuple) else result
            config.__dict__["model_type"] = source
        return result


def from_gpt2_fields(config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Mark a GPT-2 config.json with `GPT2_SOURCE` and fill in what it implies; others pass as they are.

    `n_ctx` has no effect in transformers' GPT-2, whose models are often trained with another one than `n_positions`.
    """
    if config_dict.get("model_type") != "gpt2":
        return dict(config_dict)
    result = dict(config_dict)
    positions = result.get("n_positions", HFGPTConfig.max_position_embeddings)
    if (context := result.pop("n_ctx", positions)) != positions:
        logger.warning(
            f"`n_ctx` ({context}) is not `n_positions` ({positions}): it has no effect in GPT-2, and is ignored."
        )
    vocab_size = result.get("vocab_size", HFGPTConfig.vocab_size)
    implied = {name: value for name, value in GPT2_TOKEN_IDS.items() if value < vocab_size}
    return {**implied, **result, "model_type": HFGPTConfig.model_type, "hfgpt_source": GPT2_SOURCE}


def canonical_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Write every alias under the name of its field.

    Raises:
        ValueError: a field and its alias (or two aliases of one field) have different values.
    """
    result: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    for name, value in values.items():
        field = HFGPTConfig.attribute_map.get(name, name)
        if field in result and result[field] != value:
            raise ValueError(
                f"`{given_as[field]}` ({result[field]!r}) and `{name}` ({value!r}) are the same field. Give one."
            )
        result.setdefault(field, value)
        given_as.setdefault(field, name)
    return result


def unknown_field_message(name: str) -> str:
    """Say that `name` is no field of a model, and which one it may have meant."""
    candidates = [field.name for field in fields(HFGPTConfig)] + list(HFGPTConfig.attribute_map)
    nearest = difflib.get_close_matches(name, candidates, n=1)
    return f"unknown field `{name}`." + (f" Did you mean `{nearest[0]}`?" if nearest else "")
