"""Models of transformers with all their weights, also those that bring code of their own.

That code is run only where the caller says so. remote_code.py compares hfgpt's own, and runs none.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, NanoChatConfig, PreTrainedConfig, PreTrainedModel

from hfgpt.configuration_hfgpt import GPT2_SOURCE
from hfgpt.system.console import print_status
from hfgpt.system.network import limit_waiting
from hfgpt.weights.remote_code import MODEL_TYPE

ARCHITECTURES = (MODEL_TYPE, GPT2_SOURCE, NanoChatConfig.model_type)
"""What `hfgpt.weights.load` reads from folders, by code that is here."""

BROKEN_MODEL = (OSError, SafetensorError, StrictDataclassError, RuntimeError, ValueError)
"""What transformers raises for a model that is not there, damaged, or of another kind."""


def brings_own_code(source: str) -> bool:
    """Whether a source is a language model with its code beside it, of an architecture that is none of hfgpt's."""
    auto_map = fields_of_foreign(source).get("auto_map")
    return isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map


def fields_of_foreign(source: str) -> dict[str, Any]:
    """What a config.json holds, if its model is of another architecture than hfgpt's; else nothing."""
    if Path(source).is_file():
        return {}
    limit_waiting()
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError):
        return {}  # what reads it says what is wrong with it
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str | None):
        return {}
    return {} if fields.get("model_type") in ARCHITECTURES else fields


def load_by_own_code(source: str, dtype: torch.dtype | None, trust_remote_code: bool) -> PreTrainedModel:
    """Load a model of which `brings_own_code` is true, in eval mode.

    Where transformers knows its architecture, or a package registered it that was imported, the code is not needed.

    Raises:
        ValueError: its code is needed and not trusted, or does not run, or see `load_whole`.
    """
    needs_code = fields_of_foreign(source).get("model_type") not in CONFIG_MAPPING
    if needs_code and not trust_remote_code:
        raise ValueError(
            f"{source} brings code of its own, which would be run. Add --trust-remote-code if you trust it."
        )
    try:
        return load_whole(source, dtype, trust_remote_code=needs_code)
    except BROKEN_MODEL as error:
        raise ValueError(f"no model {source!r}: {' '.join(str(error).split())}") from error


def load_whole(source: str, dtype: torch.dtype | None, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a causal language model by transformers, in eval mode.

    Args:
        source: folder or Hub id.
        dtype: of the weights in memory; None keeps that of the file.
        trust_remote_code: whether code that lies beside the weights may be run.

    Raises:
        ValueError: a tensor is missing, which transformers would fill with random numbers.
    """
    model, loading = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype or "auto", trust_remote_code=trust_remote_code, output_loading_info=True
    )
    if missing := sorted(set(loading["missing_keys"]) - set(model.all_tied_weights_keys)):
        raise ValueError(
            f"its weights lack {len(missing)} tensors that its config asks for, such as {missing[0]!r}. "
            "Random numbers would stand in for them."
        )
    if unused := sorted(loading["unexpected_keys"]):
        print_status(
            f"{source}: {len(unused)} tensors of its weights have no place in the model, such as {unused[0]!r}."
        )
    return model.eval()
