"""A user's own text in a message. Imports no library."""

LONGEST_QUOTE = 200
"""Characters of a user's text that a message shows: long paths are told apart by their ends. Of a longer text it shows
half as many."""


def shorten(text: str) -> str:
    """A user's text as a message shows it: whole, or its beginning and how many characters there are."""
    if len(text) <= LONGEST_QUOTE:
        return text
    return f"{text[: LONGEST_QUOTE // 2]}… ({len(text):,} characters)"


def quote(value: object) -> str:
    """A value as Python writes it, of a length that fits a message."""
    return shorten(repr(value))


def shorten_words(message: str, words: list[str]) -> str:
    """A message in which every long word that a user typed is shortened, and so is the value of a `key=value`."""
    for text in (text for word in words for text in (word, word.partition("=")[2])):
        if len(text) > LONGEST_QUOTE:
            message = message.replace(text, shorten(text)).replace(repr(text)[1:-1], shorten(text))
    return message
