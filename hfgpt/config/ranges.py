"""What values an option may have, written beside it in schema.py: `field(default=16, metadata=at_least(1))`."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from hfgpt.system.quoting import quote

Rules = Mapping[str, Callable[[Any], bool]]
"""What a value must be, in words that follow "must be", and whether one is."""


def at_least(least: float, most: float = math.inf) -> Rules:
    """A finite number from `least` to `most`, or None."""
    return {
        "finite": lambda value: value != math.inf,
        f"at least {least}": lambda value: value is None or value >= least,
        f"at most {most}": lambda value: value is None or value <= most,
    }


def steps_or_epoch(least: int) -> Rules:
    """A number of steps, or `epoch`."""
    meaning = f"a number of steps, at least {least}, or 'epoch'"
    return {meaning: lambda value: value == "epoch" or (type(value) is int and value >= least)}


def switch_or(word: str) -> Rules:
    """True, false, or a word that leaves it to the program."""
    return {f"true, false or {word!r}": lambda value: type(value) is bool or value == word}


def one_of(*choices: str) -> Rules:
    """One of some texts."""
    return {f"one of {list(choices)}": lambda value: value in choices}


def check_ranges(section: Any, prefix: str = "") -> None:
    """Check every option of a section and of the sections in it.

    Raises:
        ValueError: naming the option, its value, and what it must be.
    """
    for option in fields(section):
        value = getattr(section, option.name)
        if is_dataclass(value):
            check_ranges(value, f"{option.name}.")
        check_value(prefix + option.name, value, option.metadata)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ValueError: with the choices there are.
    """
    check_value(name, value, one_of(*choices))


def check_value(name: str, value: Any, rules: Rules) -> None:
    for meaning, is_right in rules.items():
        if not is_right(value):
            raise ValueError(f"`{name}` must be {meaning}, got {quote(value)}.")
