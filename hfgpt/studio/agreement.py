"""Whether two sides compute the same: nothing is timed before that is known."""

import torch
from torch import Tensor

TIGHT = 1e-4
"""Allowed in fp32, where two orders of summing differ by 1e-6 or so, and the two kinds of GELU by 6e-4."""
LOOSE = 0.5
"""Allowed between a step in bf16, or compiled, and the same in fp32: gradients of 0 are off by 1."""


def difference(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """How far apart two results are, and where most.

    Args:
        mine: numbers and gradients, which may differ by rounding, or ids, which may not.
        theirs: by the same names.

    Returns:
        The largest difference of a tensor, relative to its length in `theirs`, to which a thousandth of that of all of
        them together is added: some gradients are 0 but for rounding. Infinite where names, shapes or ids differ, or
        something is not finite.
    """
    if mine.keys() != theirs.keys():
        return float("inf"), min(mine.keys() ^ theirs.keys())
    floats = [each for each in theirs.values() if each.is_floating_point() and each.ndim]
    total = float(torch.stack([each.double().norm() for each in floats]).norm()) if floats else 0.0
    worst, where = 0.0, next(iter(theirs))
    for name, expected in theirs.items():
        value = mine[name]
        if value.shape != expected.shape:
            return float("inf"), name
        if not expected.is_floating_point():
            found = 0.0 if torch.equal(value, expected.to(value.dtype)) else float("inf")
        elif torch.equal(value, expected):
            found = 0.0
        else:
            length = float(expected.double().norm()) + (1e-3 * total if expected.ndim else 0.0)
            found = float((value.double() - expected.double()).norm()) / length
        if not found <= worst:  # NaN too
            worst, where = (found if found == found else float("inf")), name
    return worst, where


def check_same(mine: dict[str, Tensor], theirs: dict[str, Tensor], names: tuple[str, str], allowed: float) -> float:
    """Refuse to go on with two sides that do not compute the same.

    Args:
        mine: of the first of `names`.
        theirs: of the second.
        names: of the sides, for the message.
        allowed: the largest `difference`; 0 asks for the same bits.

    Returns:
        The difference.

    Raises:
        ValueError: naming the tensor that differs most.
    """
    found, where = difference(mine, theirs)
    if found > allowed:
        raise ValueError(
            f"{names[0]} and {names[1]} do not compute the same: {where} differs by {found:.1e} of its size, and "
            f"{allowed:.1e} is allowed. Nothing was timed."
        )
    return found
