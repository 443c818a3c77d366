"""The ids of a tokenizer beside the rows of a model, and how much of a text those ids say.

A tokenizer's ids need not be 0 to V - 1: there may be gaps, a pad token on the last row of a padded vocabulary, tokens
that were added and never given a row. An id that no text becomes is no obstacle; one that a text becomes needs a row.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from hfgpt.data.tokenizer import count_rows, encode_arrays
from hfgpt.system.quoting import quote


def ids_of_text(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The ids that a text can become, and those that the tokenizer puts around every text.

    A special token is none of them, unless its own text becomes it: here a literal `<pad>` is text like any other.
    """
    special = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {token_id: str(tokenizer.convert_ids_to_tokens(token_id)) for token_id in tokenizer.all_special_ids}
    typed = {token_id for token_id, token in special.items() if token_id in encode_known(tokenizer, token)}
    around = set(tokenizer("")["input_ids"])
    return (set(tokenizer.get_vocab().values()) - special.keys()) | typed | around | {*unknown_ids(tokenizer)}


def encode_known(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids of a text; none if the tokenizer does not know all of it."""
    try:
        return encode_arrays(tokenizer, [text])[0].tolist()
    except ValueError:
        return []


def unknown_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The id that stands for whatever the tokenizer does not know, or none.

    It is the one of the tokenizer's model: GPT-2's tokenizer is told of an unk token, too, and never makes it.
    """
    model = tokenizer.backend_tokenizer.model
    if isinstance(model, models.Unigram):  # which has no attribute for it (tokenizers 0.23)
        unknown_id = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["unk_id"]
    else:
        unknown_id = None if model.unk_token is None else model.token_to_id(model.unk_token)
    return [] if unknown_id is None else [unknown_id]


def check_rows(
    tokenizer: PreTrainedTokenizerFast, ids: Iterable[int], rows: int, name: str, remedy: str | None = None
) -> None:
    """Refuse ids that a model has no row for, before its embedding fails on them.

    Args:
        tokenizer: that the ids are of.
        ids: that a text has become, or can become, see `ids_of_text`.
        rows: of the model's embedding, its `vocab_size`.
        name: of the tokenizer, in the message.
        remedy: for a tokenizer of another model.

    Raises:
        ValueError: naming the largest of them, and what to do.
    """
    beyond = sorted({int(token_id) for token_id in ids if token_id >= rows})
    if not beyond:
        return
    if set(beyond) <= set(tokenizer.get_added_vocab().values()):
        remedy = (
            f"{quote(tokenizer.convert_ids_to_tokens(beyond[-1]))} was added to the tokenizer alone. Give the model a "
            f"row for it, with transformers' `model.resize_token_embeddings({count_rows(tokenizer)})`, or take a "
            "tokenizer without it."
        )
    remedy = remedy or "They do not belong together: take the model's own tokenizer."
    raise ValueError(f"{name} makes the id {beyond[-1]}, the model's `vocab_size` is {rows}. {remedy}")


MOST_UNKNOWN = 0.1
"""Share of unknown tokens above which a loss says little of a text, and there is a warning."""


def describe_unknown(share: float) -> str:
    """A share of unknown tokens in words, and what it means where it is above `MOST_UNKNOWN`."""
    text = f"{share:.1%} of the tokens are unknown to the tokenizer"
    return text if share <= MOST_UNKNOWN else f"{text}: a loss says little of such a text. Train a tokenizer on it."


@dataclass(frozen=True)
class Coverage:
    """How much of some texts their ids say.

    Attributes:
        tokens: ids of the texts, and the characters that became none.
        unknown: how many of them stand for something that the tokenizer does not know. A tokenizer without a token for
            that leaves characters out; each counts as one.
        loss_of_text: why the ids do not determine the texts, in words; None if every text comes back from its ids.
    """

    tokens: int
    unknown: int
    loss_of_text: str | None

    @property
    def unknown_share(self) -> float:
        """Unknown tokens among all, in [0, 1]."""
        return self.unknown / self.tokens if self.tokens else 0.0


def cover(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], encoded: Sequence[np.ndarray]) -> Coverage:
    """Compare texts with what comes back from their ids.

    A probability of ids is one of the text only where no other text has the same ids. With an unknown token, a
    normalizer that lowers letters, or white space that is split away, bits per byte would be those of another text.

    Args:
        tokenizer: of the ids.
        texts: as they were.
        encoded: the ids of each, without what the tokenizer puts around them.

    """
    unknown_id = unknown_ids(tokenizer)
    unknown = sum(int(np.isin(ids, unknown_id).sum()) for ids in encoded)
    left_out, changed = 0, None
    for text, ids in zip(texts, encoded, strict=True):
        decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if decoded == text:
            continue
        left_out += 0 if unknown_id else max(0, count_visible(text) - count_visible(decoded))
        changed = changed or describe_change(text, decoded)
    if unknown or left_out:
        changed = f"{unknown:,} unknown tokens" if unknown else f"{left_out:,} characters left out"
    return Coverage(sum(map(len, encoded)) + left_out, unknown + left_out, changed)


def count_visible(text: str) -> int:
    """Characters that are not white space."""
    return len("".join(text.split()))


def describe_change(text: str, decoded: str) -> str:
    """The first difference between a text and what comes back from its ids, in words."""
    pairs = enumerate(zip(text, decoded, strict=False))
    same = next((at for at, (one, other) in pairs if one != other), min(len(text), len(decoded)))
    begin = max(0, same - 10)
    return f"{text[begin : same + 10]!r} comes back as {decoded[begin : same + 10]!r}"
