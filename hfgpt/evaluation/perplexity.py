"""How well a causal language model predicts texts: every token scored once, in windows, by a convention with a name.

The convention is that of lm-evaluation-harness (`loglikelihood_rolling`), so that word perplexity, byte perplexity and
bits per byte are the same numbers there and here. Each text stands alone. Its first token is predicted after the
tokenizer's bos token, or its eos token where it has no bos. A window holds at most `context` tokens; the first one of a
text scores all of its targets, each later one the next `stride`. The last one ends where the text ends and reaches back
a whole context, so that every token after the first `context` has at least `context - stride + 1` tokens before it.
`stride = context` reads the text once and is what the harness does.

All sums run over all texts before anything is divided: a mean of the perplexities of texts is no perplexity.

Shape letters: B windows in a batch, T tokens in the longest of them, K its last positions, N targets.
"""

import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hfgpt.data.vocabulary import Coverage, check_rows, cover
from hfgpt.data.words import encode_by_words
from hfgpt.evaluation.loss import Score, e_to, score_batches
from hfgpt.loss import IGNORE_INDEX
from hfgpt.system.console import route_lines

FIRST_TOKEN = ("lm-eval", "text", "skip")
"""What is scored at the beginning of a text.

`lm-eval`: all tokens that the tokenizer makes of it, those that it adds itself (such as a bos token) among them.
`text`: the text's own tokens only; a literal `<|endoftext|>` in it is text like any other.
`skip`: these without the first, which nothing precedes.
"""


TOKENS_AT_ONCE = 1024
"""Tokens of a forward pass on a CPU, which more of them make no faster, but larger."""


@dataclass(frozen=True)
class EncodedTexts:
    """Texts as token ids, and what their losses are divided by.

    Attributes:
        ids: for each text the token before its first target, then its targets, (1 + N,) int32.
        first_token: a value of `FIRST_TOKEN`.
        prefix: the token before every text's first target; None where that is the text's own first token.
        special_tokens: how many targets are special tokens.
        words: of all texts, as the harness counts them: pieces between white space, empty ones at the ends too.
        bytes: of all texts, in UTF-8.
        coverage: how much of the texts the ids say.
    """

    ids: list[np.ndarray]
    first_token: str
    prefix: str | None
    special_tokens: int
    words: int
    bytes: int
    coverage: Coverage

    @property
    def lengths(self) -> list[int]:
        """Targets in each text."""
        return [max(0, len(ids) - 1) for ids in self.ids]

    @property
    def convention(self) -> str:
        """What is conditioned on what, in words."""
        if self.prefix is None:
            return "each text alone, its first token not scored"
        kind = "as lm-eval does" if self.first_token == "lm-eval" else "and no special token scored"
        return f"each text alone, its first token predicted from {self.prefix}, {kind}"


@dataclass(frozen=True)
class Window:
    """One row of a forward pass: `ids[start:end]` of a text, scoring the targets `ids[end - scored + 1 : end + 1]`."""

    text: int
    start: int
    end: int
    scored: int


@dataclass(frozen=True)
class Perplexity:
    """One summed loss, divided by whatever people divide it by.

    Attributes:
        tokens: targets, each scored once, over all processes.
        loss: nats per token.
        loss_standard_error: see `Score`.
        token_perplexity: e to the loss; infinite beyond floating point, as those below.
        word_perplexity: e to the nats per word; None where words are not known, first tokens were not scored, or the
            tokens do not determine the texts.
        byte_perplexity: e to the nats per byte; as above.
        bits_per_byte: as above.
    """

    tokens: int
    loss: float
    loss_standard_error: float | None
    token_perplexity: float
    word_perplexity: float | None
    byte_perplexity: float | None
    bits_per_byte: float | None


@dataclass(frozen=True)
class Measurement(Perplexity):
    """What one pass over texts found.

    Attributes:
        stride: targets that each window but a text's first adds.
        windows: rows of the forward passes, over all processes.
        elapsed_seconds: of the forward passes.
    """

    stride: int
    windows: int
    elapsed_seconds: float


def encode_texts(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], first_token: str = "lm-eval", rows: int | None = None
) -> EncodedTexts:
    """Turn texts into ids, each with what its first target is predicted from.

    Args:
        tokenizer: of the model.
        texts: any number of texts of any length.
        first_token: a value of `FIRST_TOKEN`.
        rows: of the model's embedding; None leaves ids beyond it to the caller.

    Raises:
        ValueError: no such policy, the tokenizer has no token that could stand before a text or does not know all of
            it, or the model has no row for one of the ids.
    """
    if first_token not in FIRST_TOKEN:
        raise ValueError(f"`--first-token` must be one of {list(FIRST_TOKEN)}, got {first_token!r}.")
    prefix_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first_token != "skip" and prefix_id is None:
        raise ValueError(
            "the tokenizer has neither a bos nor an eos token to predict the first token from. Set "
            "`--first-token skip` to leave it out."
        )
    is_lm_eval = first_token == "lm-eval"
    encoded = encode_by_words(tokenizer, list(texts), split_special_tokens=not is_lm_eval)
    coverage = cover(tokenizer, texts, encoded)
    if is_lm_eval:
        encoded = add_as_lm_eval(tokenizer, texts, encoded, tokenizer.decode(prefix_id))
    before = [] if first_token == "skip" else [prefix_id]
    special = np.array(tokenizer.all_special_ids, dtype=np.int32)
    ids = [np.concatenate([np.array(before, dtype=np.int32), each]) for each in encoded]
    if rows is not None:
        largest = {int(each.max()) for each in ids if len(each)}
        check_rows(tokenizer, largest, rows, f"the tokenizer {tokenizer.name_or_path}")
    return EncodedTexts(
        ids=ids,
        first_token=first_token,
        prefix=None if first_token == "skip" else tokenizer.decode(prefix_id),
        special_tokens=sum(int(np.isin(each[1:], special).sum()) for each in ids),
        words=sum(len(re.split(r"\s+", text)) for text in texts),
        bytes=sum(len(text.encode("utf-8")) for text in texts),
        coverage=coverage,
    )


def add_as_lm_eval(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], encoded: list[np.ndarray], prefix: str
) -> list[np.ndarray]:
    """What the harness scores: a literal special token is one, and what the tokenizer adds itself is scored, too.

    Source:
        lm-evaluation-harness 0.4.13, `HFLM.tok_encode`.
    """
    if not tokenizer("")["input_ids"]:
        return encoded
    bare, whole = (tokenizer("a", add_special_tokens=each)["input_ids"] for each in (False, True))
    start = next((i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare), None)
    if start is None:
        raise ValueError("what the tokenizer adds to a text cannot be told apart from it. Set `--first-token text`.")
    added = [np.array(ids, dtype=np.int32) for ids in (whole[:start], whole[start + len(bare) :])]
    # It adds nothing to a text that begins with the prefix already.
    return [
        ids if text.startswith(prefix) else np.concatenate([added[0], ids, added[1]])
        for text, ids in zip(texts, encoded, strict=True)
    ]


def make_windows(lengths: Iterable[int], context: int, stride: int) -> Iterator[Window]:
    """Cover texts with windows so that each target is scored once.

    Args:
        lengths: targets in each text, from 0.
        context: longest window, in tokens.
        stride: targets that each window but the first of a text adds, 1 to `context`.

    Raises:
        ValueError: the stride is out of range; a longer one would leave out tokens.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"`--stride` must be between 1 and the context ({context}), got {stride}.")
    for text, length in enumerate(lengths):
        done = min(context, length)
        if done:
            yield Window(text, 0, done, done)
        while done < length:
            end = min(done + stride, length)
            yield Window(text, end - context, end, end - done)
            done = end


def make_batch(texts: EncodedTexts, windows: Sequence[Window]) -> dict[str, Tensor]:
    """Put windows into one batch, shorter ones filled up behind, where nothing before sees it.

    Returns:
        `input_ids` (B, T), and `shift_labels` (B, K), the targets of the last K positions; `IGNORE_INDEX` where another
        window scores them.
    """
    length = max(window.end - window.start for window in windows)
    first = min(window.end - window.start - window.scored for window in windows)
    inputs = torch.zeros((len(windows), length), dtype=torch.int64)
    targets = torch.full((len(windows), length), IGNORE_INDEX)
    for row, window in enumerate(windows):
        ids = torch.from_numpy(texts.ids[window.text][window.start : window.end + 1]).long()
        own = len(ids) - 1
        inputs[row, :own] = ids[:-1]
        targets[row, own - window.scored : own] = ids[1 + own - window.scored :]
    return {"input_ids": inputs, "shift_labels": targets[:, first:]}


def score_windows(model: PreTrainedModel, texts: EncodedTexts, windows: Sequence[Window], batch_size: int) -> Score:
    """Score the targets of all windows, of which each process takes its share.

    The longest windows come first, so that what does not fit into memory fails at once, and little is filled up.
    """
    process = PartialState()
    order = sorted(windows, key=lambda window: window.start - window.end)
    mine = order[process.process_index :: process.num_processes]
    terminal = Console(stderr=True)
    starts = track(
        range(0, len(mine), batch_size),
        description="scoring",
        console=terminal,
        transient=True,
        disable=not (terminal.is_terminal and process.is_main_process),
    )
    batches = (make_batch(texts, mine[start : start + batch_size]) for start in starts)
    with route_lines(partial(terminal.print, highlight=False, markup=False, soft_wrap=True)):
        score = score_batches(model, batches, each_token=True)
    assert score.tokens == sum(window.scored for window in windows), "a token was scored twice, or not at all"
    return score


def measure_texts(
    model: PreTrainedModel, texts: EncodedTexts, context: int, stride: int, batch_size: int | None = None
) -> Measurement:
    """Score every target of some texts once.

    Args:
        model: any causal language model; on several processes, each has it.
        texts: from `encode_texts`, for this model.
        context: longest window, in tokens.
        stride: see `make_windows`.
        batch_size: windows in one forward pass; None takes 8, on a CPU fewer, if these have more than `TOKENS_AT_ONCE`.

    Raises:
        ValueError: there is nothing to score, or a stride out of range.
        FloatingPointError: the model's loss is no number.
    """
    windows = list(make_windows(texts.lengths, context, stride))
    if not windows:
        raise ValueError("there is nothing to score: no text holds a token after its first.")
    if batch_size is None:
        batch_size = min(8, max(1, TOKENS_AT_ONCE // context)) if model.device.type == "cpu" else 8
    started_at = time.perf_counter()
    score = score_windows(model, texts, windows, batch_size)
    elapsed_seconds = time.perf_counter() - started_at
    if not math.isfinite(score.total):
        raise FloatingPointError(f"the loss is {score.total}: a weight is no number, or {model.dtype} is too narrow.")
    is_whole = texts.prefix is not None and texts.coverage.loss_of_text is None
    perplexity = summarize(score, texts.words, texts.bytes, is_whole)
    return Measurement(**asdict(perplexity), stride=stride, windows=len(windows), elapsed_seconds=elapsed_seconds)


def summarize(score: Score, words: int | None, bytes: int | None, is_whole: bool = True) -> Perplexity:
    """Divide the summed loss by tokens, words and bytes.

    Args:
        score: of all targets.
        words: of the same texts; None or 0 where they are not known.
        bytes: as above.
        is_whole: whether every token of the texts was scored, and the tokens determine the texts. Otherwise the nats
            would be those of something else than these words.
    """
    per_word, per_byte = (score.total / units if units and is_whole else None for units in (words, bytes))
    return Perplexity(
        tokens=score.tokens,
        loss=score.loss,
        loss_standard_error=score.standard_error,
        token_perplexity=score.perplexity,
        word_perplexity=None if per_word is None else e_to(per_word),
        byte_perplexity=None if per_byte is None else e_to(per_byte),
        bits_per_byte=None if per_byte is None else per_byte / math.log(2),
    )
