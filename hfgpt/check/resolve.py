"""From what a user names to a `Subject`: a folder, a class in a module, or a model on the Hub."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hfgpt.check.subject import Subject, shrink
from hfgpt.system.suggest import nearest_path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def resolve(what: str, trust_remote_code: bool = False) -> Subject:
    """Find the class and the config of a model.

    Args:
        what: a folder of a model; `package.module:Class`, whose class has a `config_class`; or a model on the Hub, of
            which only the config and, if it is trusted, the code is read.
        trust_remote_code: whether code that lies beside the weights may be run.

    Raises:
        ValueError: there is no such model, its code is not trusted, or it is no causal language model.
    """
    subject = None
    if Path(what).is_dir():
        subject = resolve_pretrained(what, trust_remote_code, folder=Path(what))
    elif re.fullmatch(r"[\w.]+:\w+", what):
        subject = resolve_class(what)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", what) and not what.endswith((".py", ".json", ".safetensors")):
        subject = resolve_pretrained(what, trust_remote_code)
    if subject is not None:
        check_has_logits(subject)
        return subject
    raise ValueError(
        f"{what!r} is no folder of a model, no class written as `package.module:Class`, and no model of the Hub."
        + nearest_path(Path(what))
    )


def check_has_logits(subject: Subject) -> None:
    """Refuse a model without a language model's head; one that raises is left to the promises, which report that.

    Raises:
        ValueError: its output has no logits for each token of the vocabulary.
    """
    try:
        with torch.no_grad():
            output = subject.make()(subject.ids(1, 3))
    except Exception:  # whatever a stranger's model raises: the promises run it again, and report it
        return
    shape = tuple(getattr(output, "logits", torch.empty(0)).shape)
    if shape != (1, 3, subject.vocab_size):
        found = f"logits of shape {shape}" if len(shape) > 1 else f"no logits in its {type(output).__name__}"
        raise ValueError(
            f"{subject.model_class.__name__} is no language model: {found}, where (1, 3, {subject.vocab_size}) are due "
            "for 3 tokens. Name a class whose forward returns an output with `logits`."
        )


def resolve_class(what: str) -> Subject:
    """A class by the name of its module and its own, with a config of its `config_class`.

    Raises:
        ValueError: there is no such class, or it is no language model of transformers.
    """
    module_name, _, class_name = what.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a program, unlike `python -m`, does not look into the current folder
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"{what!r}: there is no module {error.name!r}, here or installed.") from error
    model_class = getattr(module, class_name, None)
    config_class = getattr(model_class, "config_class", None)
    if not isinstance(model_class, type) or not hasattr(model_class, "_from_config"):
        raise ValueError(f"{what!r}: {module_name} has no class {class_name} derived from PreTrainedModel.")
    if config_class in (None, PreTrainedConfig):
        raise ValueError(f"{what!r} has no `config_class`. Write `config_class = YourConfig` into the class.")
    config, is_small = shrink(model_class, config_class())
    return Subject(what, model_class, config, is_small, auto_model=is_registered(config, model_class))


def resolve_pretrained(what: str, trust_remote_code: bool, folder: Path | None = None) -> Subject:
    """What config.json says of a model.

    Raises:
        ValueError: it brings code that is not trusted, or is no causal language model.
    """
    values, _ = PreTrainedConfig.get_config_dict(what)
    if folder is not None and not values:
        raise ValueError(f"{what} is no model folder: it has no config.json.")
    auto_map = values.get("auto_map") or {}
    brings_code = "AutoModelForCausalLM" in auto_map
    is_known = values.get("model_type") in CONFIG_MAPPING
    if auto_map and not is_known and not trust_remote_code:
        raise ValueError(f"{what} brings code of its own, which would be run. Add --trust-remote-code if you trust it.")
    config: Any = AutoConfig.from_pretrained(what, trust_remote_code=trust_remote_code)
    if brings_code and trust_remote_code:
        model_class = get_class_from_dynamic_module(auto_map["AutoModelForCausalLM"], what)
        model_class.register_for_auto_class("AutoModelForCausalLM")
    elif type(config) in AutoModelForCausalLM._model_mapping:
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
    else:
        raise ValueError(f"{what} is no causal language model: AutoModelForCausalLM knows no {config.model_type!r}.")
    tokenizer = None
    if folder is not None and any((folder / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    small, is_small = shrink(model_class, config)
    return Subject(what, model_class, small, is_small, folder, True, tokenizer, trust_remote_code)


def is_registered(config: Any, model_class: type) -> bool:
    """Whether AutoModelForCausalLM makes this class of this config."""
    mapping = AutoModelForCausalLM._model_mapping
    return type(config) in mapping and mapping[type(config)] is model_class
