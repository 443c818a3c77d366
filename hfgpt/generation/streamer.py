"""From ids to text, while they arrive: whole characters only, and never more than up to a stop text."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

REPLACEMENT_CHARACTER = "\ufffd"
"""What a tokenizer decodes to where the bytes so far are no whole character."""

MAX_BYTES_OF_A_PART = 3
"""A UTF-8 character has at most 4 bytes, so an unfinished one has at most 3, in as many tokens."""

MAX_HELD_TOKENS = 16
"""Text that does not become whole is looked back at no further than this, so that time stays linear in length."""


def stream_text(tokenizer: Any, token_ids: Iterable[int | Tensor]) -> Iterator[str]:
    """Turn the ids of one row into pieces of text, each as soon as it consists of whole characters.

    Args:
        tokenizer: has transformers' `decode`.
        token_ids: ids of one row, as int or as tensors of one element, as `hfgpt.generation.decoding.stream` yields
            them for one prompt.

    Yields:
        Pieces of text, none of them empty; joined they are what `TextStream` says.
    """
    text = TextStream(tokenizer)
    for token_id in token_ids:
        if piece := text.push(int(token_id)):
            yield piece
    if rest := text.finish():
        yield rest


class TextStream:
    """Takes the ids of one row one by one, and gives their text as soon as it consists of whole characters.

    A Korean syllable or an emoji may be split over tokens; its parts are held back until it is complete. The pieces
    joined are `tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)`: for byte-level BPE
    always, for SentencePiece's byte fallback where the bytes are valid UTF-8. Takes time linear in the number of ids.

    Args:
        tokenizer: has transformers' `decode`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # The window starts with tokens whose text is out already, `shown` characters of it: SentencePiece tokenizers
        # drop the space before the very first token they are given, so a token's own text shows only after another one.
        self.window: list[int] = []
        self.new_from, self.shown = 0, 0

    def decode(self, ids: list[int]) -> str:
        """The text of some ids, as the tokenizer alone makes it."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def push(self, token_id: int) -> str:
        """Take the next id; returns the text that has become whole with it, often none."""
        # Special tokens and ids outside the vocabulary have no text. Asked twice over, because a single
        # SentencePiece space has none either.
        if not self.decode([token_id, token_id]):
            return ""
        self.window.append(token_id)
        text = self.decode(self.window)
        piece = ""
        if len(text) > self.shown and not text.endswith(REPLACEMENT_CHARACTER):
            piece = text[self.shown :]
            self.window = self.window[self.new_from :]
            self.new_from, self.shown = len(self.window), len(self.decode(self.window))
        elif len(self.window) > MAX_HELD_TOKENS:
            # These bytes are no text, or the text is a row of real U+FFFD. Only the last one can still change.
            piece = text[self.shown : -1]
            self.window = self.window[-MAX_BYTES_OF_A_PART:]
            self.new_from, self.shown = 0, len(self.decode(self.window)) - 1
        return piece

    def finish(self) -> str:
        """The text that never became whole, once no id follows."""
        return self.decode(self.window)[self.shown :]


class StoppingText:
    """A `TextStream` that ends before the first of some stop texts, and never gives what may become one.

    Only the new text counts: a stop text that begins in the prompt is none.

    Args:
        tokenizer: has transformers' `decode`.
        stops: texts that end the row, none of them empty; they are not part of it.

    Attributes:
        has_stopped: whether a stop text came; what is pushed after that is ignored.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.text = TextStream(tokenizer)
        self.stops = stops
        self.held = ""
        self.has_stopped = False

    def push(self, token_id: int) -> str:
        """Take the next id; returns the text that is certain now, often none."""
        return "" if self.has_stopped else self.release(self.text.push(token_id))

    def finish(self) -> str:
        """The text that was held back, once no id follows."""
        if self.has_stopped:
            return ""
        certain = self.release(self.text.finish())
        rest, self.held = self.held, ""
        return certain + rest

    def release(self, piece: str) -> str:
        """Add a piece of text; returns what no stop text can begin in any more."""
        held = self.held + piece
        starts = [start for stop in self.stops if (start := held.find(stop)) >= 0]
        if starts:
            self.has_stopped = True
            self.held = ""
            return held[: min(starts)]
        certain = len(held) - longest_beginning(held, self.stops)
        self.held = held[certain:]
        return held[:certain]


def longest_beginning(text: str, stops: Sequence[str]) -> int:
    """Number of characters at the end of `text` that a stop text begins with; 0 if there is none."""
    lengths = (length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
    return max(lengths, default=0)
