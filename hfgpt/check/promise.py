"""A promise: one sentence about a causal language model, and the function that finds out whether it is kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hfgpt.check.subject import Subject

Status = Literal["pass", "fail", "n/a", "not tried"]

GROUPS = ("loading", "masks", "cache", "generation", "attention", "training", "tools")
"""What promises are about, in the order in which they are tried."""

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""How far the same mathematics, added up in another order, may be apart, per unit of the largest value."""


@dataclass(frozen=True)
class Finding:
    """What was found about one promise.

    Attributes:
        status: "pass", "fail", "n/a" where the question does not arise for this model, or "not tried" where the time
            did not suffice: a slow machine says nothing about a model.
        measured: the number, or the word, that was found; None if there is none.
        bound: what it was to be at most, or to be.
        detail: one line: what was compared with what, or why the question does not arise.
    """

    status: Status
    measured: float | str | None = None
    bound: float | str | None = None
    detail: str = ""


class NotDone(Exception):
    """A process needed more time than it was given: whether the promise is kept is not known."""


@dataclass(frozen=True)
class Promise:
    """A promise that `check` tries.

    Attributes:
        name: a sentence in kebab-case, such as `left-padding-changes-nothing`.
        group: one of `GROUPS`.
        meaning: what a user of the model would meet if it is broken: one sentence.
        usual_causes: the lines that usually break it: one sentence.
        find: the function.
    """

    name: str
    group: str
    meaning: str
    usual_causes: str
    find: Callable[["Subject"], Finding]


PROMISES: dict[str, Promise] = {}
"""Every promise by its name; `hfgpt.check.promises` fills it."""


def promise(
    group: str, *, meaning: str, usual_causes: str
) -> Callable[[Callable[["Subject"], Finding]], Callable[["Subject"], Finding]]:
    """Register a function as a promise, under its own name with dashes.

    Args:
        group: one of `GROUPS`.
        meaning: see `Promise`.
        usual_causes: see `Promise`.
    """
    assert group in GROUPS

    def register(find: Callable[["Subject"], Finding]) -> Callable[["Subject"], Finding]:
        name = find.__name__.replace("_", "-")
        assert name not in PROMISES
        PROMISES[name] = Promise(name, group, meaning, usual_causes, find)
        return find

    return register


def at_most(measured: float, bound: float, detail: str) -> Finding:
    """A number that must not exceed a bound; NaN does."""
    return Finding("pass" if measured <= bound else "fail", measured, bound, detail)


def holds(is_kept: bool, detail: str, measured: float | str | None = None, bound: float | str | None = None) -> Finding:
    """What is kept or is not."""
    return Finding("pass" if is_kept else "fail", measured, bound, detail)


def not_applicable(detail: str) -> Finding:
    """The question does not arise; `detail` says why."""
    return Finding("n/a", detail=detail)


def max_difference(first: Tensor, second: Tensor) -> float:
    """The largest difference between two tensors of one shape; infinite for other shapes, NaN if any value is."""
    if first.shape != second.shape:
        return float("inf")
    return (first.detach().double() - second.detach().double()).abs().max().item() if first.numel() else 0.0


def close(actual: Tensor, expected: Tensor, detail: str, *, factor: float = 1.0) -> Finding:
    """The same mathematics in another order of adding: the largest difference, and what is allowed for this dtype.

    Args:
        actual: what was found.
        expected: what it is to be.
        detail: see `Finding`.
        factor: how much more is allowed than `TOLERANCE`.
    """
    scale = max(1.0, expected.detach().abs().max().item())
    return at_most(max_difference(actual, expected), TOLERANCE[expected.dtype] * scale * factor, detail)


def worst(findings: list[Finding]) -> Finding:
    """Of several findings, each for a variant of one question, the one to report: a failure, or the largest number."""
    assert findings
    order = {"fail": 3, "not tried": 2, "pass": 1, "n/a": 0}
    return max(findings, key=lambda each: (order[each.status], excess(each)))


def excess(finding: Finding) -> float:
    """By how much a number exceeds its bound; 0 if they are no numbers."""
    if isinstance(finding.measured, int | float) and isinstance(finding.bound, int | float):
        return finding.measured - finding.bound if finding.measured == finding.measured else float("inf")
    return 0.0
