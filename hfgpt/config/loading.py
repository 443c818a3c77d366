"""How a recipe is read: defaults < recipe YAML < `key.path=value`.

What is misspelt, impossible or without effect is refused before anything is loaded or written.
"""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hfgpt.config.keys import as_item, as_override, as_yaml, check_keys, suggest_override
from hfgpt.config.recipes import find_recipe
from hfgpt.config.schema import TOKENIZER_FIELDS, OptimConfig, RunConfig
from hfgpt.config.validation import check_model, check_options, shorten_warmup
from hfgpt.config.values import describe_kind, expand_paths, is_kind, kind_words, replace_text, whole_number


def load_config(recipe: str | Path, overrides: Mapping[str, Any] | Iterable[str] = ()) -> RunConfig:
    """Read a recipe.

    Args:
        recipe: path of a YAML file, or the name of a recipe that comes with hfgpt (`demo`).
        overrides: `key.path=value`, later ones win. Text fields take what follows `=` as it is. Or values by key path,
            nested or not: `{"train.max_steps": 100}` or `{"train": {"max_steps": 100}}`.

    Raises:
        ValueError: no such recipe, an unknown key, a value of the wrong type, or options that contradict one another.
    """
    merged = OmegaConf.structured(RunConfig)
    OmegaConf.set_readonly(merged, False)
    layers = read_layers(recipe, overrides)
    for layer in layers:
        try:
            merged = OmegaConf.merge(merged, {key: value for key, value in layer.items() if key != "model"})
        except OmegaConfBaseException as error:
            key = str(error.full_key).partition("[")[0]  # of an item of a list
            raise ValueError(unescape(describe_kind(key, field_type(key.split(".")), layer))) from error
    config = unescape(OmegaConf.to_object(merged))
    assert isinstance(config, RunConfig)
    config = shorten_warmup(expand_paths(config), layers)
    check_options(config)
    # Last, because its classes import torch: all else is answered before.
    sections = read_models(layers, config.model_class)
    model = {name: value for section in sections for name, value in section.items()}
    return check_model(replace(config, model=unescape(model)))


def read_layers(recipe: str | Path, overrides: Mapping[str, Any] | Iterable[str]) -> list[dict[str, Any]]:
    """What the recipe says, and then each override: values by key; the keys are checked."""
    if isinstance(overrides, str):
        overrides = [overrides]
    overrides = overrides if isinstance(overrides, Mapping) else list(overrides)
    path = find_recipe(recipe)
    layer = yaml_mapping(path)
    own_model = names_own_model(layer, overrides)
    try:
        check_keys(layer, lambda key, value: as_yaml(key, unescape(value)), own_model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    layers = [layer]
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            layers.append(nest(str(key).split("."), plain(value)))
            check_keys(layers[-1], as_item, own_model)
        overrides = []
    for text in overrides:
        layers.append(parse_override(text))
        typed = text.partition("=")[2]
        check_keys(layers[-1], partial(spell_override, typed), own_model)
    return replace_text([read_section(layer) for layer in layers])


def names_own_model(recipe: Mapping[str, Any], overrides: Mapping[str, Any] | list[str]) -> bool:
    """Whether the last `model_class` that is said is one: then `model` holds fields of its config."""
    said = overrides.items() if isinstance(overrides, Mapping) else [text.partition("=")[::2] for text in overrides]
    values = [recipe.get("model_class"), *(value for key, value in said if str(key).strip() == "model_class")]
    return values[-1] not in (None, "", "null")


def spell_override(typed: str, key: str, value: Any) -> str:
    """Another key with the value as it was typed: 1e-3, not 0.001."""
    return as_override(key, typed)


def value_origins(config: RunConfig, recipe: str | Path, overrides: Iterable[str]) -> dict[str, str]:
    """Where each value of a loaded run comes from: key path -> `default`, `recipe` or `override`."""
    layers = read_layers(recipe, overrides)
    layers = [
        {**layer, "model": model} for layer, model in zip(layers, read_models(layers, config.model_class), strict=True)
    ]
    recipe_layer, *override_layers = layers
    origins = dict.fromkeys(flatten(asdict(config)), "default")
    warmup_steps = OptimConfig.warmup_steps
    for origin, layer in [("recipe", recipe_layer), *(("override", layer) for layer in override_layers)]:
        origins |= {key: origin for key in flatten(layer) if key in origins}
        warmup_steps = layer.get("optim", {}).get("warmup_steps", warmup_steps)
    if config.optim.warmup_steps != warmup_steps:  # shortened
        origins["optim.warmup_steps"] = origins["train.max_steps"]
    return origins


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by their key paths; an empty mapping is a value."""
    result: dict[str, Any] = {}
    for key, value in section.items():
        is_section = isinstance(value, Mapping) and value
        result |= flatten(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return result


def config_yaml(config: RunConfig) -> str:
    """The run as YAML, every value written out, in the order of schema.py."""
    return yaml.dump(asdict(config), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)


def annotated_yaml(config: RunConfig, origins: Mapping[str, str], is_unicode: bool = True) -> str:
    """The same with a comment at each value that says where it comes from; it loads as the same run.

    Args:
        config: the run.
        origins: from `value_origins`.
        is_unicode: whether letters beyond ASCII may stand as they are.
    """
    lines: list[str] = []
    for name, value in asdict(config).items():
        is_section = isinstance(value, dict) and value
        if is_section:
            lines.append(f"{name}:")
        for key, inner in value.items() if is_section else [(name, value)]:
            # In one line, however long: a comment cannot stand inside of a folded text.
            text = yaml.dump({key: inner}, Dumper=RecipeDumper, allow_unicode=is_unicode, width=math.inf)
            first, *rest = text.splitlines()
            indent = "  " if is_section else ""
            origin = origins[f"{name}.{key}" if is_section else name]
            lines += [f"{indent + first:<40}  # {origin}", *(indent + line for line in rest)]
    return "\n".join(lines) + "\n"


class RecipeDumper(yaml.SafeDumper):
    """Writes text so that it is read back as the same text, by OmegaConf too."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Quote what is no plain line, and 1e3, which is text to PyYAML and a number to OmegaConf."""
        needs_quotes = not text.isprintable() or re.fullmatch(r"[-+]?[\d._]+[eE][-+]?\d+", text)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if needs_quotes else None)


RecipeDumper.add_representer(str, RecipeDumper.represent_text)


def yaml_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file as OmegaConf does (1e-3 is a number), its text escaped.

    Raises:
        ValueError: the file is not YAML, or not a mapping.
    """
    try:
        text = escape(path.read_text(encoding="utf-8"))
        loaded = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not a recipe: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} is not a recipe: it must hold `key: value` lines.")
    return {str(key): value for key, value in loaded.items()}


def parse_override(text: str) -> dict[str, Any]:
    """Turn `key.path=value` into a layer, its text escaped.

    Raises:
        ValueError: there is no `=`, or what follows it is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not an override.{suggest_override(text)}")
    names = key.strip().split(".")
    kind = field_type(names)
    parsed: Any = escape(value)
    if kind not in (str, str | None):
        try:
            layer: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={parsed}"]), resolve=False)
        except yaml.YAMLError as error:
            raise ValueError(f"`{key}`: {value!r} is not YAML. Is a bracket or a quote left open?") from error
        parsed = layer["value"]
    elif kind is not str and value in ("", "null"):
        parsed = None
    return nest(names, parsed)


def nest(names: list[str], value: Any) -> dict[str, Any]:
    """A value under the names that lead to it."""
    *outer, last = names
    layer = {last: value}
    for name in reversed(outer):
        layer = {name: layer}
    return layer


def plain(value: Any) -> Any:
    """A value from Python as a recipe holds it: paths as text, all text escaped."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return escape(str(value)) if isinstance(value, str | Path) else value


def field_type(names: list[str]) -> Any:
    """The type of the field that a key path leads to, or None."""
    section: Any = RunConfig
    for name in names:
        section = get_type_hints(section).get(name) if is_dataclass(section) else None
    return section


def escape(text: str) -> str:
    """Hide `${` and `???` from OmegaConf, which would read expressions in them: a recipe holds values."""
    return re.sub(r"[$?]", r"\g<0>.", text)


def unescape(value: Any) -> Any:
    """Undo `escape` in every text of a config."""
    if isinstance(value, str):
        return re.sub(r"([$?])\.", r"\1", value)
    if isinstance(value, dict):
        return {key: unescape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unescape(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: unescape(getattr(value, item.name)) for item in fields(value)})
    return value


def read_section(values: Mapping[str, Any], section: type = RunConfig) -> dict[str, Any]:
    """Write 1e3 as a whole number where one is meant; the keys are checked."""
    known = get_type_hints(section)
    return {
        key: read_section(value, known[key]) if is_dataclass(known[key]) else whole_number(value, known[key])
        for key, value in values.items()
    }


def read_models(layers: Sequence[Mapping[str, Any]], model_class: str | None) -> list[dict[str, Any]]:
    """The model's part of each layer, under the names of the config's fields; as it is, for a class of your own.

    Of the architectures only nanochat is named in it.

    Raises:
        ValueError: there is no such architecture, a field and its alias have different values, or a value is of the
            wrong type.
    """
    sections = [layer.get("model") or {} for layer in layers]
    if not any(sections) or model_class is not None:
        return [dict(section) for section in sections]
    from hfgpt.config.architectures import FIELD_TYPES, architecture_of, own_fields

    architecture = architecture_of(unescape(sections))
    types = {name: kind for fields in FIELD_TYPES.values() for name, kind in fields.items()} | FIELD_TYPES[architecture]
    result = []
    for section in sections:
        values = own_fields(section, architecture)
        for name, value in values.items():
            kind = types[name]
            values[name] = whole_number(value, kind)
            if name not in TOKENIZER_FIELDS and not is_kind(values[name], kind):
                raise ValueError(f"`model.{name}` must be {kind_words(kind)}, got {unescape(value)!r}.")
        # Named where it is chosen, and never as GPT-2, which a recipe that names none means as well.
        is_named = "architecture" in section and architecture != "gpt2"
        result.append({"architecture": architecture, **values} if is_named else values)
    return result
