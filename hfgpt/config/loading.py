"""How a recipe is read: defaults < recipe YAML < `key.path=value`.

What is misspelt, impossible or without effect is refused before anything is loaded or written.
"""

import io
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hfgpt.config.recipes import find_recipe
from hfgpt.config.schema import OptimConfig, RunConfig
from hfgpt.config.validation import check, shorten_warmup
from hfgpt.configuration_hfgpt import HFGPTConfig, canonical_fields
from hfgpt.system.suggest import did_you_mean

MODEL_FIELDS = {*HFGPTConfig.__annotations__, *HFGPTConfig.attribute_map}


def load_config(recipe: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a recipe.

    Args:
        recipe: path of a YAML file, or the name of a recipe that comes with hfgpt (`demo`).
        overrides: `key.path=value`, later ones win. Text fields take what follows `=` as it is.

    Raises:
        ValueError: no such recipe, an unknown key, a value of the wrong type, or options that contradict one another.
    """
    layers = read_layers(recipe, overrides)
    try:
        merged = OmegaConf.structured(RunConfig)
        OmegaConf.set_readonly(merged, False)
        for layer in layers:
            merged = OmegaConf.merge(merged, layer)
        config = unescape(OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ValueError(f"`{error.full_key}`: {unescape(str(error).splitlines()[0].rstrip('.'))}.") from error
    assert isinstance(config, RunConfig)
    config = shorten_warmup(config, layers)
    return check(config)


def read_layers(recipe: str | Path, overrides: Iterable[str]) -> list[dict[str, Any]]:
    """What the recipe says, and then each override: values by key, checked, under the fields' names."""
    path = find_recipe(recipe)
    return [
        read_section(layer, RunConfig) for layer in (yaml_mapping(path), *(parse_override(text) for text in overrides))
    ]


def value_origins(config: RunConfig, recipe: str | Path, overrides: Iterable[str]) -> dict[str, str]:
    """Where each value of a loaded run comes from: key path -> `default`, `recipe` or `override`."""
    recipe_layer, *override_layers = read_layers(recipe, overrides)
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
        raise ValueError(f"{text!r} is not an override. Write `key.path=value`, such as `train.max_steps=100`.")
    names = key.strip().split(".")
    kind = field_type(names)
    parsed: Any = escape(value)
    if kind not in (str, str | None):
        try:
            parsed = OmegaConf.from_dotlist([f"value={parsed}"])["value"]
        except yaml.YAMLError as error:
            raise ValueError(f"`{key}`: {value!r} is not YAML. Is a bracket or a quote left open?") from error
    elif kind is not str and value in ("", "null"):
        parsed = None
    for name in reversed(names):
        parsed = {name: parsed}
    return parsed


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


def read_section(values: Any, section: type, name: str = "the recipe") -> dict[str, Any]:
    """Check the keys of a section against its class, and of those in it; write the model's aliases as its fields.

    Raises:
        ValueError: it is no section, or has an unknown key, which is named with the nearest known one.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"`{name}` must hold `key: value` lines, got {values!r}.")
    known, result = get_type_hints(section), {}
    for key, value in values.items():
        if key not in known:
            hint = did_you_mean(str(key), known) or f" It has {sorted(known)}."
            raise ValueError(f"Key '{key}' not in '{name}'.{hint}")
        if is_dataclass(known[key]):
            result[key] = read_section(value, known[key], key)
        elif (section, key) == (RunConfig, "model") and value is not None:
            result[key] = read_model(value)
        else:
            result[key] = whole_number(value, known[key])
    return result


def read_model(values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"`model` must hold `field: value` lines, got {values!r}.")
    for name in values:
        if name not in MODEL_FIELDS:
            raise ValueError(f"`model`: unknown field `{name}`.{did_you_mean(str(name), MODEL_FIELDS)}")
    kinds = HFGPTConfig.__annotations__
    return {name: whole_number(value, kinds[name]) for name, value in canonical_fields(values).items()}


def whole_number(value: Any, kind: Any) -> Any:
    """Read 1e3 as a whole number where one is meant."""
    is_meant = isinstance(value, float) and value.is_integer() and kind in (int, int | None, Any)
    return int(value) if is_meant else value
