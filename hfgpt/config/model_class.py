"""The model that a recipe names: hfgpt's own, or a class of your own that `model_class` names.

Reading a recipe imports no class of your own, so that a run may be looked at, compared and pushed where that is not
installed. Opening a run does, and checks the `model` section with it.
"""

import difflib
import importlib
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from hfgpt.config.schema import RunConfig
from hfgpt.config.values import whole_number


def find_model_class(config: RunConfig) -> Any:
    """The class that `model_class` names: a `PreTrainedModel` with a language model's head.

    A package is found where it is installed, else in the current folder.

    Raises:
        ValueError: there is no such class.
    """
    name = str(config.model_class)
    module_name, colon, class_name = name.partition(":")
    if not (colon and class_name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise ValueError(f"`model_class` must be `package.module:Class`, got {name!r}.")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"`model_class` ({name!r}): there is no module {error.name!r}. Run this in the folder that holds it, "
                "or install it as a package."
            ) from error
        raise
    from transformers import GenerationMixin, PreTrainedModel  # which takes a second

    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and issubclass(found, GenerationMixin)):
        raise ValueError(
            f"`model_class` ({name!r}): {module_name} has no class {class_name!r} that is a transformers model with "
            "`generate`. Name one called `...ForCausalLM`."
        )
    return found


def build_model_config(config: RunConfig, **from_tokenizer: Any) -> Any:
    """The config of the model that the recipe describes.

    Args:
        config: the recipe.
        **from_tokenizer: its fields that the tokenizer sets.

    Raises:
        ValueError: there is no such class, an unknown field, values of which no model can be built, or fewer positions
            than a row has tokens.
    """
    from huggingface_hub.errors import StrictDataclassError

    from hfgpt.config.architectures import architecture_of, check_fields, make_config  # imports torch

    if config.model_class is None:
        check_fields((name for name in config.model if name != "architecture"), architecture_of([config.model]))
        make, values = make_config, {"model": config.model}
    else:
        make, values = find_model_class(config).config_class, own_values(config)
    try:
        built = make(**values, **from_tokenizer)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ValueError(f"`model`: {' '.join(str(error).split())}") from error
    if not isinstance(getattr(built, "max_position_embeddings", None), int):
        raise ValueError(
            f"{type(built).__name__} has no `max_position_embeddings`, the longest row in tokens: declare that field."
        )
    if config.data.block_size > built.max_position_embeddings:
        raise ValueError(
            f"`data.block_size` ({config.data.block_size}) is longer than the model's `n_positions` "
            f"({built.max_position_embeddings}). Lower the one or raise the other."
        )
    return built


def own_values(config: RunConfig) -> dict[str, Any]:
    """The `model` section as fields of the config of a class of your own.

    Raises:
        ValueError: there is no such class, or no such field.
    """
    config_class = find_model_class(config).config_class
    kinds = {each.name: each.type for each in fields(config_class)}
    values: dict[str, Any] = {}
    for name, value in config.model.items():
        field = config_class.attribute_map.get(name, name)
        if field not in kinds:
            nearest = difflib.get_close_matches(name, [*kinds, *config_class.attribute_map], n=1)
            hint = f" Did you mean `{nearest[0]}`?" if nearest else ""
            raise ValueError(f"`model.{name}`: {config_class.__name__} has no such field.{hint}")
        values[name] = whole_number(value, kinds[field])
    return values
