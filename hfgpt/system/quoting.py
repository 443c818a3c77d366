"""A user's own text in a message. Imports no library."""

LONGEST_QUOTE = 60
"""Characters of a user's text that a message shows; of a longer one, its beginning."""


def shorten(text: str) -> str:
    """A user's text as a message shows it: at most its first characters, and how many there are."""
    if len(text) <= LONGEST_QUOTE:
        return text
    return f"{text[: LONGEST_QUOTE - 20]}… ({len(text):,} characters)"


def quote(value: object) -> str:
    """A value as Python writes it, in one line that stays short."""
    return shorten(repr(value))
