"""Text to ids word by word, each different word tokenized once: the ids of the tokenizer, several times as fast.

A tokenizer such as GPT-2's cuts a text into words by a pattern, and then makes the ids of each word for itself. Most
words are there many times. So a text is cut here, by the same pattern, the tokenizer's own model makes the ids of each
word that is new, and they are remembered.
"""

import re
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import regex
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hfgpt.data.tokenizer import cut, encode_arrays

PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?[{L}]+| ?[{N}]+| ?[^\s{L}{N}]+|\s+(?!\S)|\s+"
"""GPT-2's, that of tokenizers' `ByteLevel`; L are letters, N numbers."""
WORD = regex.compile(PATTERN.format(L=r"\p{L}", N=r"\p{N}"))
ASCII_WORD = re.compile(PATTERN.format(L="A-Za-z", N="0-9"), re.ASCII)
"""The same for text in ASCII, twice as fast."""
GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False)
AS_CHARACTERS = str.maketrans(bytes_to_unicode())
"""Byte -> the character that stands for it in the vocabulary of a byte-level tokenizer."""

REMEMBERED = 300_000
"""Words that are remembered; about 60 MB of memory."""
LONGEST = 100
"""Characters of a word that is remembered."""
CHECK_EVERY = 64
"""Of so many texts, or parts of a long one, one is tokenized in one piece as well."""


class DifferentIdsError(Exception):
    """A text has other ids in one piece than word by word; what was made of earlier texts is in doubt, too."""

    def __str__(self) -> str:
        return "The tokenizer gives a text other ids in one piece than word by word."


class WordIds(dict[str, bytes]):
    """The ids of words, int32, made when they are first asked for."""

    def __init__(self, model: models.Model) -> None:
        self.model = model

    def __missing__(self, word: str) -> bytes:
        characters = word.encode().decode("latin-1").translate(AS_CHARACTERS)
        ids = array("i", [token.id for token in self.model.tokenize(characters)]).tobytes()
        if len(word) <= LONGEST:
            if len(self) == REMEMBERED:
                self.clear()
            self[word] = ids
        return ids


class WordEncoder:
    """Like `encode_arrays`, for many texts, given in any number of calls.

    Texts that may not be cut go through the tokenizer in one piece: with a tokenizer of another kind all of them, else
    those in which there is an added token, or a character that the tokenizer does not cut as it is cut here.

    Args:
        tokenizer: must not change any more.
        split_special_tokens: see `encode_arrays`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, split_special_tokens: bool = True) -> None:
        self.tokenizer, self.split_special_tokens = tokenizer, split_special_tokens
        self.is_cut_by_words = is_cut_by_words(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        self.whole = [str(token) for token in added if not (split_special_tokens and token.special)]
        self.ids_of_word = WordIds(tokenizer.backend_tokenizer.model)
        self.known: set[str] = set()
        self.strange: set[str] = set()
        self.parts = 0

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: the tokenizer once, and no words, which it learns of its own texts."""
        return {**self.__dict__, "ids_of_word": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "ids_of_word": WordIds(state["tokenizer"].backend_tokenizer.model)}

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32 (tokens,).

        Raises:
            ValueError: as `encode_arrays`.
            DifferentIdsError: the check of one text has failed.
        """
        may_cut = [self.may_cut(text) for text in texts]
        in_one_piece = iter(self.encode_whole([text for text, may in zip(texts, may_cut, strict=True) if not may]))
        return [
            self.encode_by_words(text) if may else next(in_one_piece) for text, may in zip(texts, may_cut, strict=True)
        ]

    def encode_documents(self, texts: list[str], separator: str | None) -> list[np.ndarray]:
        """The ids of each document behind an end-of-text, unless `separator` is None: what rows are cut from."""
        end = np.array([] if separator is None else [self.tokenizer.eos_token_id], dtype=np.int32)
        return [np.concatenate([end, ids]) for ids in self.encode(texts)]

    def encode_whole(self, texts: list[str]) -> list[np.ndarray]:
        return encode_arrays(self.tokenizer, texts, self.split_special_tokens)

    def encode_by_words(self, text: str) -> np.ndarray:
        """The ids of a text that may be cut."""
        ids = bytearray()
        for part in cut(text, lambda left, right: True):  # of a long text not all words are there at once
            words = (ASCII_WORD if part.isascii() else WORD).findall(part)
            of_part = b"".join(map(self.ids_of_word.__getitem__, words))
            if self.parts % CHECK_EVERY == 0 and of_part != self.encode_whole([part])[0].tobytes():
                raise DifferentIdsError
            self.parts += 1
            ids += of_part
        return np.frombuffer(ids, dtype=np.int32)

    def may_cut(self, text: str) -> bool:
        """Whether the words of a text have the ids of the text."""
        if not self.is_cut_by_words or any(token in text for token in self.whole):
            return False
        if text.isascii():
            return True
        characters = set(text)
        self.strange |= {each for each in characters - self.known if not is_cut_alike(each, WORD)}
        self.known |= characters
        return self.strange.isdisjoint(characters)


def is_cut_alike(character: str, word: Any) -> bool:
    """Whether a pattern takes a character for what tokenizers does: a letter, a number, white space, or neither.

    It knows nothing else of it, but its table may be of another version of Unicode.
    """
    if "\ud800" <= character <= "\udfff":  # half a character, which tokenizers refuses
        return False
    around = f"a{character}1{character}.{character}"
    theirs = [span for _, span in GPT2_SPLIT.pre_tokenize_str(around)]
    return theirs == [match.span() for match in word.finditer(around)]


def is_cut_by_words(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a tokenizer is a BPE of bytes with GPT-2's pattern, and nothing changes a text before it is cut."""
    backend = tokenizer.backend_tokenizer
    split, model = backend.pre_tokenizer, backend.model
    is_gpt2s = isinstance(split, pre_tokenizers.ByteLevel) and split.use_regex and not split.add_prefix_space
    if not is_gpt2s or backend.normalizer is not None or not isinstance(model, models.BPE) or model.dropout:
        return False
    return all(model.token_to_id(character) is not None for character in bytes_to_unicode().values())


def encode_by_words(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], split_special_tokens: bool = True
) -> list[np.ndarray]:
    """Like `encode_arrays`, the faster the more text there is."""
    try:
        return WordEncoder(tokenizer, split_special_tokens).encode(texts)
    except DifferentIdsError:
        return encode_arrays(tokenizer, texts, split_special_tokens)
