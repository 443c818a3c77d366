"""What values of a recipe mean together with where they stand: texts that replace one another, paths, and types."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hfgpt.config.schema import RunConfig

SOURCES = {
    "source": ("source", "name", "split", "validation_split", "text_column"),
    "files": ("files", "validation_files", "text_column"),
}
"""The two ways to name a text, each with the options that belong to it."""

KINDS = {
    int: "a whole number",
    float: "a number",
    float | int: "a number",
    bool: "true or false",
    str: "a text",
    list[float]: "a list of numbers, such as [0.9, 0.95]",
    list[str]: "a list of texts, such as [tensorboard]",
}
"""What a value must be, by the type of its field."""


def replace_text(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take the text out of a recipe if its overrides name another: files for a data set, or a data set for files.

    Args:
        layers: what the recipe says, and then each override.
    """
    recipe, *overrides = layers
    given: dict[str, Any] = {}
    for layer in overrides:
        given |= layer.get("data", {})
    data = recipe.get("data", {})
    for own, other in (("files", "source"), ("source", "files")):
        if given.get(own) is not None and given.get(other) is None and data.get(other) is not None:
            data = {key: value for key, value in data.items() if key == own or key not in SOURCES[other]}
            return [recipe | {"data": data}, *overrides]
    return layers


def expand_paths(config: RunConfig) -> RunConfig:
    """Read `~` at the beginning of a path as the home folder: a shell does so only at the beginning of a word."""
    data, tokenizer = config.data, config.tokenizer
    return replace(
        config,
        output_dir=expand_home(config.output_dir),
        init_from=expand_home(config.init_from),
        tokenizer=replace(tokenizer, name=expand_home(tokenizer.name)),
        data=replace(
            data,
            source=expand_home(data.source),
            files=expand_home(data.files),
            validation_files=expand_home(data.validation_files),
        ),
    )


def expand_home(value: Any) -> Any:
    """Expand a path, or each of several; anything else stays as it is."""
    if isinstance(value, list | tuple):
        return [expand_home(each) for each in value]
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    return os.path.expanduser(value) if isinstance(value, str) else value


def describe_kind(key: str, kind: Any, layer: Mapping[str, Any]) -> str:
    """Say what the value at a key path must be, and what it is."""
    value: Any = layer
    for name in key.split("."):
        value = value[name]
    return f"`{key}` must be {kind_words(kind)}, got {value!r}."


def kind_words(kind: Any) -> str:
    """What a value of a field's type is, in words."""
    plain = next(each for each in KINDS if kind in (each, each | None))
    return KINDS[plain] if kind == plain else f"{KINDS[plain]} or null"


def is_kind(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type; True is no number."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def whole_number(value: Any, kind: Any) -> Any:
    """Read 1e3 as a whole number where one is meant, and 1 as a number with a fraction where that is."""
    if type(value) is int and kind in (float, float | None):
        return float(value)
    is_meant = isinstance(value, float) and value.is_integer() and kind in (int, int | None, Any)
    return int(value) if is_meant else value
