"""The nearest known name to one that is misspelt."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: " Did you mean `x`?", or "" if no known name is near."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean `{nearest[0]}`?" if nearest else ""
