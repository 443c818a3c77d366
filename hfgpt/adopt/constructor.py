"""How the values of a config become a module: as keywords, a dictionary, or an object of one of several kinds."""

import ast
import dataclasses
import inspect
import re
import traceback
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from hfgpt.adopt.gpt_call import as_dataclass, as_namespace, with_attributes
from hfgpt.system.suggest import did_you_mean

CONFIG_WORDS = ("config", "cfg", "conf", "args", "hparams", "hps", "params", "settings", "opt")


@dataclass(frozen=True)
class Constructor:
    """How the module is made.

    Attributes:
        values: the constructor's arguments, with the defaults that it would take; plain values.
        direct: names that it takes as keywords.
        settings: parameter that takes all others as one object; None if there is none.
        code: the expression that makes this object of `arguments`, in the generated file.
        make: the same as a function.
        imports: names that the expression needs of the class's file.
    """

    values: dict[str, Any]
    direct: tuple[str, ...]
    settings: str | None = None
    code: str = ""
    make: Callable[[dict[str, Any]], Any] = dict
    imports: tuple[str, ...] = ()

    def build(self, module_class: type[nn.Module]) -> nn.Module:
        """Make the module."""
        arguments = dict(self.values)
        direct = {name: arguments.pop(name) for name in self.direct}
        return module_class(**direct, **({self.settings: self.make(arguments)} if self.settings else {}))


def parameters_of(definition: ast.ClassDef) -> list[str] | None:
    """The parameters of a class's constructor, as its text says; None if it has none of its own."""
    for each in definition.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            return [one.arg for one in (*each.args.posonlyargs, *each.args.args, *each.args.kwonlyargs)][1:]
    return None


def find_constructor(module_class: type[nn.Module], home: ModuleType, values: dict[str, Any]) -> Constructor:
    """Find out how a class takes these values, by trying.

    Args:
        module_class: to be made.
        home: the file it was taken from, where its config class may be.
        values: what the user's config says.

    Raises:
        ValueError: it does not take them; said with the reason of the try that fits best.
    """
    has_own = "__init__" in {name for each in module_class.__mro__[:-1] if each is not nn.Module for name in vars(each)}
    # nn.Module's own takes anything, and refuses it.
    own = inspect.signature(module_class).parameters if has_own else {}
    parameters = {name: each for name, each in own.items() if each.kind is not each.VAR_POSITIONAL}
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    parameters = {name: each for name, each in parameters.items() if each.kind is not each.VAR_KEYWORD}
    required = [name for name, each in parameters.items() if each.default is each.empty]
    direct = {name: value for name, value in values.items() if name in parameters}
    rest = {name: value for name, value in values.items() if name not in parameters}
    lacking = [name for name in required if name not in direct]
    settings = choose_settings(parameters, lacking, rest, direct)
    if settings is None:
        if rest and not takes_any:
            name = next(iter(rest))
            raise ValueError(
                f"{module_class.__name__} takes no {name!r}.{did_you_mean(name, list(parameters))} "
                f"It takes {', '.join(parameters) or 'nothing'}."
            )
        if lacking:
            raise ValueError(
                f"{module_class.__name__} needs {', '.join(map(repr, lacking))}. Write "
                f"{'it' if len(lacking) == 1 else 'them'} into a YAML file, and give it as --config."
            )
        defaults = {
            name: each.default for name, each in parameters.items()
            if name not in direct and is_plain(each.default)
        }  # fmt: skip
        names = [name for name in parameters if name in direct or name in defaults] + list(rest)
        every = {**defaults, **direct, **rest}
        ordered = {name: as_default(every[name], parameters.get(name)) for name in names}
        return tried(Constructor(ordered, tuple(names)), module_class)
    if settings in direct:
        rest = direct.pop(settings)
    return try_each(module_class, home, parameters[settings], direct, rest)


def choose_settings(parameters: Mapping[str, Any], lacking: list[str], rest: Mapping, direct: Mapping) -> str | None:
    """The parameter that takes all values that have no parameter of their own."""
    given = [name for name, value in direct.items() if isinstance(value, Mapping) and is_settings(parameters[name])]
    if len(given) == 1 and not rest:
        return given[0]
    if len(lacking) == 1 and (rest or is_settings(parameters[lacking[0]])):
        return lacking[0]
    optional = [name for name, each in parameters.items() if name not in direct and is_settings(each)]
    return optional[0] if rest and not lacking and len(optional) == 1 else None


def is_settings(parameter: inspect.Parameter) -> bool:
    annotation, default = parameter.annotation, parameter.default
    has_class = isinstance(annotation, type) and annotation.__module__ not in ("builtins", "typing")
    if annotation is parameter.empty:  # then a number as its default says that it is no object
        has_class = default is parameter.empty or default is None or not is_plain(default)
    words = re.split(r"[_\d]+", parameter.name.lower())
    return has_class or any(word in CONFIG_WORDS for word in words) or parameter.name.lower().endswith("config")


def try_each(
    module_class: type[nn.Module], home: ModuleType, parameter: inspect.Parameter, direct: dict, rest: dict
) -> Constructor:
    """The first kind of object that the class can be made with."""
    failures = []
    for values, code, make, imports in kinds(module_class, home, parameter, rest):
        every = {**direct, **values}
        found = Constructor(every, tuple(direct), parameter.name, code, make, imports)
        try:
            return tried(found, module_class)
        except ValueError as error:
            failures.append(error)
    raise failures[0]


def kinds(
    module_class: type[nn.Module], home: ModuleType, parameter: inspect.Parameter, values: dict[str, Any]
) -> Iterable[tuple[dict[str, Any], str, Callable[[dict], Any], tuple[str, ...]]]:
    """Values with defaults, the expression, the function and the names it needs; the likeliest kind first."""
    classes = {name: each for name, each in vars(home).items() if isinstance(each, type) and not is_module(each)}
    annotated = annotation_of(module_class, parameter)
    default = parameter.default
    likely = [name for name, each in classes.items() if annotated is each or default is each or type(default) is each]
    records = [name for name, each in classes.items() if dataclasses.is_dataclass(each) and name not in likely]
    for name in likely:
        if dataclasses.is_dataclass(classes[name]) and not takes(classes[name], values):
            fields = [each.name for each in dataclasses.fields(classes[name])]
            key = next(key for key in values if key not in fields)
            raise ValueError(f"{name} has no {key!r}.{did_you_mean(key, fields)} It has {', '.join(fields)}.")
    for name in [*likely, *sorted(records, key=lambda each: len(dataclasses.fields(classes[each])))]:
        found = classes[name]
        if dataclasses.is_dataclass(found) and takes(found, values):
            complete = with_defaults(found, values)
            yield complete, f"as_dataclass({name}, arguments)", partial(as_dataclass, found), (name,)
    default_config = getattr(module_class, "get_default_config", None)
    if callable(default_config):
        code = f"with_attributes({module_class.__name__}.get_default_config(), arguments)"
        for each in (values, {"model_type": None, **values}):  # minGPT: sizes, or the type that stands for them
            yield each, code, partial(set_on_new, default_config), ()
    for name in classes:
        is_config = any(word in name.lower() for word in CONFIG_WORDS) or name in likely
        if is_config and not dataclasses.is_dataclass(classes[name]) and classes[name].__module__ == home.__name__:
            found = classes[name]
            if accepts(found, values):
                yield values, f"{name}(**arguments)", partial(spread, found), (name,)
            elif all(hasattr(found, each) for each in values):
                code = f"with_attributes({name}(), arguments)"
                complete = {each: value for each, value in attributes(found).items()} | values
                yield complete, code, partial(set_on_new, found), (name,)
    plain_kinds = [
        (values, "arguments", dict, ()),
        (values, "as_namespace(arguments)", as_namespace, ()),
    ]
    by_attribute = counts_attributes(module_class, parameter.name)
    yield from reversed(plain_kinds) if by_attribute else plain_kinds


def spread(kind: Callable[..., Any], values: dict[str, Any]) -> Any:
    return kind(**values)


def set_on_new(make: Callable[[], Any], values: dict[str, Any]) -> Any:
    return with_attributes(make(), values)


def is_module(each: type) -> bool:
    return issubclass(each, nn.Module)


def annotation_of(module_class: type, parameter: inspect.Parameter) -> Any:
    try:
        return typing.get_type_hints(vars(module_class)["__init__"]).get(parameter.name)
    except Exception:  # annotations are a stranger's expressions, and may mean nothing here: then they say nothing
        return None


def takes(found: Any, values: Mapping[str, Any]) -> bool:
    return set(values) <= {each.name for each in dataclasses.fields(found) if each.init}


def accepts(found: type, values: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(found).bind(**values)
    except (TypeError, ValueError):
        return False
    return "__init__" in vars(found) or "_fields" in vars(found)  # of its own, or a NamedTuple's


def attributes(found: type) -> dict[str, Any]:
    """The plain class attributes, which are a config's defaults."""
    return {name: each for name, each in vars(found).items() if not name.startswith("_") and is_plain(each)}


def with_defaults(found: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Every plain field of a dataclass."""
    made = as_dataclass(found, dict(values))
    result: dict[str, Any] = {}
    for each in dataclasses.fields(found):
        value = getattr(made, each.name)
        if dataclasses.is_dataclass(value):
            result[each.name] = with_defaults(type(value), values.get(each.name) or {})
        elif each.init and (is_plain(value) or each.name in values):
            given = values.get(each.name, value)
            result[each.name] = tuple(given) if isinstance(each.default, tuple) and isinstance(given, list) else given
    return result


def as_default(value: Any, parameter: inspect.Parameter | None) -> Any:
    """A list as a tuple, where that is what the parameter's default is: YAML has no tuples."""
    is_tuple = parameter is not None and isinstance(parameter.default, tuple) and isinstance(value, list)
    return tuple(value) if is_tuple else value


def is_plain(value: Any) -> bool:
    """Whether config.json can hold it."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and is_plain(each) for name, each in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def counts_attributes(module_class: type, name: str) -> bool:
    """Whether its code writes `config.x` more often than `config["x"]`."""
    text = inspect.getsource(inspect.getmodule(module_class))  # type: ignore[arg-type]
    word = re.escape(name)
    items = len(re.findall(rf"\b{word}\s*(?:\[|\.get\(|\.keys\(|\.items\()|\*\*{word}\b", text))
    return len(re.findall(rf"\b{word}\.\w+", text)) > items


def tried(constructor: Constructor, module_class: type[nn.Module]) -> Constructor:
    """The same, if the module can be made so.

    Raises:
        ValueError: with the line of its code that failed.
    """
    try:
        with torch.random.fork_rng([]):
            constructor.build(module_class)
    except Exception as error:
        raise ValueError(f"{module_class.__name__} cannot be made of this config: {describe(error)}") from error
    return constructor


def describe(error: BaseException) -> str:
    """An error in somebody's code on one line, with the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    where = f", at `{last.line}`" if last is not None and last.line else ""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no reason given'}{where}."
