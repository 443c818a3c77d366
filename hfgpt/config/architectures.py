"""The architectures that `model.architecture` names: the fields that each has in a recipe, and the config they make.

Imports torch, by the classes of the configs.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import NanoChatConfig, PreTrainedConfig

from hfgpt.config.schema import ARCHITECTURES, DROPOUT_FIELDS, NANOCHAT_FIELDS, TOKENIZER_FIELDS
from hfgpt.configuration_hfgpt import HFGPTConfig, canonical_fields
from hfgpt.modeling_nanochat import check_config
from hfgpt.system.suggest import did_you_mean

NANOCHAT_TYPES: dict[str, Any] = {
    **{name: kind for name, kind in HFGPTConfig.__annotations__.items() if name in NanoChatConfig.__annotations__},
    **{name: NanoChatConfig.__annotations__.get(name, float) for name in NANOCHAT_FIELDS},
}

FIELD_TYPES = {"gpt2": HFGPTConfig.__annotations__, "nanochat": NANOCHAT_TYPES}
"""Architecture -> the fields of a recipe's `model` section, and what each must be."""


def architecture_of(sections: Iterable[Mapping[str, Any]]) -> str:
    """The architecture that the last of several `model` sections names; GPT-2 if none does.

    Raises:
        ValueError: there is none of this name.
    """
    name = [*("gpt2",), *(section["architecture"] for section in sections if "architecture" in section)][-1]
    if name not in ARCHITECTURES:
        hint = did_you_mean(str(name), ARCHITECTURES)
        raise ValueError(f"`model.architecture` must be one of {list(ARCHITECTURES)}, got {name!r}.{hint}")
    return name


def own_fields(section: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The fields of a `model` section under their own names instead of GPT-2's.

    Raises:
        ValueError: a field and its alias have different values.
    """
    kept = {"architecture", *(NANOCHAT_FIELDS if architecture == "nanochat" else ())}
    aliased = canonical_fields({name: value for name, value in section.items() if name not in kept})
    return {**aliased, **{name: value for name, value in section.items() if name in kept - {"architecture"}}}


def check_fields(names: Iterable[str], architecture: str) -> None:
    """Refuse fields that another architecture has, and this one has not.

    Raises:
        ValueError: naming the first, and what may be set instead.
    """
    types = FIELD_TYPES[architecture]
    for name in names:
        if name not in types:
            other = next(each for each in ARCHITECTURES if name in FIELD_TYPES[each])
            has = [each for each in types if each not in TOKENIZER_FIELDS]
            dropout = [each for each in has if each in DROPOUT_FIELDS]
            raise ValueError(
                f"`model.{name}` is of the architecture {other}, and `model.architecture` is {architecture}, which has "
                f"{', '.join(dropout if name in DROPOUT_FIELDS else has)}. Leave it out."
            )


def make_config(model: Mapping[str, Any], **tokenizer_fields: Any) -> PreTrainedConfig:
    """The config of the model that a recipe describes.

    Args:
        model: the `model` section, checked.
        **tokenizer_fields: some of `TOKENIZER_FIELDS`; transformers' defaults stand for the others.

    Raises:
        ValueError: a model of this shape cannot be built.
    """
    fields = {name: value for name, value in model.items() if name != "architecture"}
    if architecture_of([model]) == "gpt2":
        return HFGPTConfig(**fields, **tokenizer_fields)
    theta = fields.pop("rope_theta", 10_000.0)
    if fields.get("intermediate_size") is None:  # nanochat's own; transformers' default is that of one size
        fields["intermediate_size"] = 4 * fields.get("hidden_size", NanoChatConfig.hidden_size)
    rope = {"rope_type": "default", "rope_theta": theta}
    config = NanoChatConfig(**fields, rope_parameters=rope, **tokenizer_fields)
    check_config(config)
    return config
