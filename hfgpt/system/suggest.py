"""The nearest known name to one that is misspelt."""

import difflib
from collections.abc import Iterable
from pathlib import Path


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of an error message: " Did you mean `x`?", or "" if no known name is near.

    Args:
        name: what is misspelt.
        known: the names there are.
        cutoff: how alike the two must be, from 0 to 1.
    """
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean `{nearest[0]}`?" if nearest else ""


def nearest_path(path: Path) -> str:
    """The same for a path that does not exist: the file or folder beside it whose name is nearest."""
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [each.name for each in path.parent.iterdir()], n=1, cutoff=0.7)
    return f" Did you mean `{path.parent / near[0]}`?" if near else ""
