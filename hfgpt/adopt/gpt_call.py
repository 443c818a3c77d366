"""How a GPT that knows nothing of transformers is made and called; what `hfgpt adopt` measured is written in its words.

This file travels with the weights, so it imports nothing of hfgpt.

Shape letters: B batch, T positions, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from types import SimpleNamespace
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """How the GPT is called and where its logits are; `hfgpt adopt` measured it.

    Attributes:
        time_first: whether it takes ids (T, B) and gives logits (T, B, V).
        arguments: parameter -> what it gets beside the ids: a key of `GIVEN`, or a value.
        output: keys, indices or names of attributes that lead to the logits in what it returns.
    """

    time_first: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    output: tuple[str | int, ...] = ()

    def logits(self, gpt: nn.Module, ids_BT: Tensor) -> Tensor:
        """The logits of all positions, (B, T, V)."""
        rows, length = ids_BT.shape
        found = self.run(gpt, ids_BT)
        for step in self.output:
            found = found[step] if isinstance(step, int) or isinstance(found, Mapping) else getattr(found, step)
        if found.ndim == 2:  # of all rows one after another
            found = found.view(*((length, rows) if self.time_first else (rows, length)), -1)
        return found.transpose(0, 1) if self.time_first else found

    def run(self, gpt: nn.Module, ids_BT: Tensor) -> Any:
        """What the GPT returns for these ids."""
        ids = (ids_BT.t() if self.time_first else ids_BT).contiguous()  # some take a view of them
        given = {name: GIVEN[kind](ids, self.time_first) if isinstance(kind, str) else kind for name, kind in
                 self.arguments.items()}  # fmt: skip
        return gpt(ids, **given)


def seen_TT(ids: Tensor, time_first: bool) -> Tensor:
    length = ids.shape[0 if time_first else 1]
    return torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()


GIVEN = {
    "ids": lambda ids, time_first: ids,
    "ones for every token": lambda ids, time_first: torch.ones_like(ids),
    "true where seen": seen_TT,
    "true where hidden": lambda ids, time_first: ~seen_TT(ids, time_first),
    "minus infinity where hidden": lambda ids, time_first: torch.zeros(
        seen_TT(ids, time_first).shape, device=ids.device
    ).masked_fill(~seen_TT(ids, time_first), float("-inf")),
    "true where seen, for all heads": lambda ids, time_first: seen_TT(ids, time_first)[None, None],
    "one where seen": lambda ids, time_first: seen_TT(ids, time_first).float(),
}
"""What a parameter beside the ids is given: name of the kind -> (ids, whether time comes first) -> tensor."""


def decode(value: Any) -> Any:
    """A constructor's argument as it was, from how config.json holds it: tuples are marked, numbers' types named."""
    if (
        isinstance(value, str)
        and value.startswith("torch.")
        and isinstance(getattr(torch, value[6:], None), torch.dtype)
    ):
        return getattr(torch, value[6:])
    if isinstance(value, Mapping) and set(value) == {"tuple"}:
        return tuple(decode(each) for each in value["tuple"])
    if isinstance(value, Mapping):
        return {name: decode(each) for name, each in value.items()}
    return [decode(each) for each in value] if isinstance(value, list) else value


def as_namespace(value: Any) -> Any:
    """Nested dictionaries as objects with attributes."""
    if isinstance(value, Mapping):
        return SimpleNamespace(**{name: as_namespace(each) for name, each in value.items()})
    return value


def as_dataclass(kind: Any, values: Mapping[str, Any]) -> Any:
    """An object of a dataclass, with those in it that are dataclasses themselves."""
    hints = get_type_hints(kind)
    inner = {name for name, hint in hints.items() if is_dataclass(hint) and isinstance(values.get(name), Mapping)}
    return kind(**{name: as_dataclass(hints[name], each) if name in inner else each for name, each in values.items()})


def with_attributes(settings: Any, values: Mapping[str, Any]) -> Any:
    """The same object, after each of these became an attribute of it."""
    for name, value in values.items():
        inner = getattr(settings, name, None)
        if isinstance(value, Mapping) and inner is not None and not isinstance(inner, Mapping):
            with_attributes(inner, value)
        else:
            setattr(settings, name, value)
    return settings
