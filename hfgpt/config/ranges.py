"""What values an option may have, written beside it in schema.py: `field(default=16, metadata=at_least(1))`."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

Check = Callable[[str, Any], None]
"""Takes an option's name and its value, and raises ValueError, which names both and says what would be right."""


def check_ranges(section: Any, prefix: str = "") -> None:
    """Check every option of a section and of the sections in it.

    Raises:
        ValueError: naming the option, its value, and what would be right.
    """
    for option in fields(section):
        value = getattr(section, option.name)
        if is_dataclass(value):
            check_ranges(value, f"{option.name}.")
        elif "check" in option.metadata:
            option.metadata["check"](f"{prefix}{option.name}", value)


def at_least(least: float, most: float = math.inf) -> dict[str, Check]:
    """A finite number from `least` to `most`, or None."""

    def check(name: str, value: float | None) -> None:
        if value is None:
            return
        if not least <= value < math.inf:
            raise ValueError(f"`{name}` must be {'finite' if value == math.inf else f'at least {least}'}, got {value}.")
        if value > most:
            raise ValueError(f"`{name}` must be at most {most}, got {value}.")

    return {"check": check}


def must_be(meaning: str, is_right: Callable[[Any], bool]) -> dict[str, Check]:
    """Whatever else a few words can say."""

    def check(name: str, value: Any) -> None:
        if not is_right(value):
            raise ValueError(f"`{name}` must be {meaning}, got {value}.")

    return {"check": check}


def steps_or_epoch(least: int) -> dict[str, Check]:
    """A number of steps, or `epoch`."""

    def check(name: str, value: Any) -> None:
        if value != "epoch" and not (type(value) is int and value >= least):
            raise ValueError(f"`{name}` must be a number of steps, at least {least}, or 'epoch', got {value!r}.")

    return {"check": check}


def one_of(*choices: str) -> dict[str, Check]:
    """One of some texts; of a list, each."""

    def check(name: str, value: str | Iterable[str]) -> None:
        for each in [value] if isinstance(value, str) else value:
            check_choice(name, each, choices)

    return {"check": check}


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse what is none of the choices.

    Raises:
        ValueError: with the choices there are.
    """
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")
