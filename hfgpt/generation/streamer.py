"""From ids to text while they arrive: in whole characters, and up to a stop text."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

REPLACEMENT_CHARACTER = "\ufffd"
"""What a tokenizer decodes to where the bytes so far are no whole character."""

MAX_BYTES_OF_A_PART = 3
"""A UTF-8 character has at most 4 bytes, so an unfinished one has at most 3, in as many tokens."""

MAX_HELD_TOKENS = 16
"""Tokens that are decoded again while a character is incomplete, so that time stays linear in length."""


def stream_text(tokenizer: Any, token_ids: Iterable[int | Tensor]) -> Iterator[str]:
    """Turn the ids of one row into pieces of text, each as soon as it consists of whole characters.

    Args:
        tokenizer: has transformers' `decode`.
        token_ids: ids of one row, as int or as tensors of one element, as `hfgpt.generation.decoding.generate_stream`
            yields them for one prompt.

    Yields:
        Pieces of text, none of them empty; see `TextStream` for what they join to.
    """
    text = TextStream(tokenizer)
    for token_id in token_ids:
        if piece := text.push(int(token_id)):
            yield piece
    if rest := text.finish():
        yield rest


class TextStream:
    """Takes the ids of one row one by one, and returns their text as soon as it consists of whole characters.

    A Korean syllable or an emoji may be split over tokens; its parts are held back until it is complete. Joined, the
    pieces are `tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)`: for byte-level BPE
    always, for SentencePiece's byte fallback where the bytes are valid UTF-8. Takes time linear in the number of ids.

    Args:
        tokenizer: has transformers' `decode`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # The window starts with tokens whose text, `shown` characters, was returned before: SentencePiece tokenizers
        # drop the space before the first token they are given, so a token's own text shows only after another one.
        self.window: list[int] = []
        self.new_from, self.shown = 0, 0

    def decode(self, ids: list[int]) -> str:
        """The text of some ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def push(self, token_id: int) -> str:
        """Take the next id; returns the text that is complete with it, often none."""
        # Special tokens and ids outside the vocabulary have no text. The id is doubled because a single SentencePiece
        # space has none either.
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
            # These bytes are no UTF-8, or the text is a row of real U+FFFD. Only the last one can still change.
            piece = text[self.shown : -1]
            self.window = self.window[-MAX_BYTES_OF_A_PART:]
            self.new_from, self.shown = 0, len(self.decode(self.window)) - 1
        return piece

    def finish(self) -> str:
        """The rest, with U+FFFD for an incomplete character, once no id follows."""
        return self.decode(self.window)[self.shown :]


class StoppingText:
    """A `TextStream` that ends before the first stop text, and holds back what may become one.

    A stop text must lie in the new text: one that begins in the prompt does not count.

    Args:
        tokenizer: has transformers' `decode`.
        stops: texts that end the row, none of them empty; they are not part of it.

    Attributes:
        has_stopped: whether a stop text came; later ids are ignored.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.text = TextStream(tokenizer)
        self.stops = stops
        self.held = ""
        self.has_stopped = False

    def push(self, token_id: int) -> str:
        """Take the next id; returns the text that cannot belong to a stop text any more, often none."""
        return "" if self.has_stopped else self.release(self.text.push(token_id))

    def finish(self) -> str:
        """The text that was held back, once no id follows."""
        if self.has_stopped:
            return ""
        released = self.release(self.text.finish())
        rest, self.held = self.held, ""
        return released + rest

    def release(self, piece: str) -> str:
        """Add a piece of text; returns the part in which no stop text can begin."""
        held = self.held + piece
        starts = [start for stop in self.stops if (start := held.find(stop)) >= 0]
        if starts:
            self.has_stopped, self.held = True, ""
            return held[: min(starts)]
        beginnings = (stop[:length] for stop in self.stops for length in range(1, len(stop)))
        end = len(held) - max((len(each) for each in beginnings if held.endswith(each)), default=0)
        self.held = held[end:]
        return held[:end]
