"""A run's text made ready: read, split, tokenized once, and cut into rows.

Documents are tokenized losslessly into one array with `<|endoftext|>` between them (rows.py). Rows are T + 1 ids of it
that overlap by one, so that each has T targets and no target is skipped.

Shape letters: T `block_size`.
"""

import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from hfgpt.config.model_class import build_model_config
from hfgpt.config.schema import DataConfig, RunConfig
from hfgpt.data.rows import TokenArray, TokenRows
from hfgpt.data.streaming import StreamedRows, hashes, sample_documents
from hfgpt.data.text import Documents, load_documents
from hfgpt.data.tokenizer import (
    check_end_of_text,
    encode_arrays,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from hfgpt.data.vocabulary import Coverage, cover, describe_unknown, unknown_ids
from hfgpt.data.words import DifferentIdsError, WordEncoder
from hfgpt.system.console import print_status

ROWS_VERSION = 2  # Part of the cache's key: raise it when the same text is to give other ids than before.
SAMPLE = 100_000
"""Characters of a split that are compared with what comes back from their ids."""


@dataclass(frozen=True)
class SplitCounts:
    """What one split of a text has become."""

    documents: int
    """Documents that are not empty."""
    rows: int
    """Of `data.block_size` targets."""
    tokens: int
    """Ids of all documents, and one `<|endoftext|>` between two of them, unless `data.separator` is null."""
    targets: int
    """Targets scored in one pass over the rows; with a `stride` below `block_size` some count more than once."""
    remainder: int
    """Tokens at the end that fill no row, fewer than `stride`; they are never scored."""
    padding: int
    """Places in rows that hold no target."""
    unknown_share: float = 0.0
    """Tokens that stand for what the tokenizer does not know, among all, in [0, 1]; see `Coverage`."""
    loss_of_text: str | None = None
    """Why the ids do not determine the text, in words; None where a look at `SAMPLE` characters found no reason."""


@dataclass(frozen=True)
class Rows:
    """The rows of a run."""

    train: TokenRows
    """Those to train on; with `streamed` only some of them, to be scored beside the validation rows."""
    validation: TokenRows
    train_counts: SplitCounts
    validation_counts: SplitCounts
    streamed: StreamedRows | None = None
    """Where the rows to train on come from, if they are not stored; this process's share."""


def stream_rows(data: DataConfig, tokenizer: PreTrainedTokenizerFast, seed: int, rank: int, world_size: int) -> Rows:
    """The rows of a text that is read as it comes, this process's share.

    Raises:
        ValueError: the source cannot be read, or the validation text is shorter than one row.
    """
    samples = sample_documents(data, seed)
    stream = StreamedRows(data, hashes(samples.validation), tokenizer, seed, rank, world_size)
    return replace(load_rows(samples, tokenizer, data), streamed=stream)


def load_rows(documents: Documents, tokenizer: PreTrainedTokenizerFast, data: DataConfig) -> Rows:
    """Tokenize documents, which is done once and then read from the cache of `datasets`, and cut them into rows.

    The cache's key is made of the text and the tokenizer. Of several processes, let one call this first.

    Raises:
        ValueError: a split is shorter than one row.
    """

    def load(split: Dataset, name: str) -> tuple[TokenRows, SplitCounts]:
        tokens = tokenize(split, tokenizer, data, name)
        rows, counts = make_rows(tokens, data, name)
        share, loss_of_text = look_for_unknown(split, tokens, tokenizer, data)
        return rows, replace(counts, unknown_share=share, loss_of_text=loss_of_text)

    train, train_counts = load(documents.train, "training")
    validation, validation_counts = load(documents.validation, "validation")
    return Rows(train, validation, train_counts, validation_counts)


def look_for_unknown(
    documents: Dataset, tokens: TokenArray, tokenizer: PreTrainedTokenizerFast, data: DataConfig
) -> tuple[float, str | None]:
    """`SplitCounts.unknown_share` and `SplitCounts.loss_of_text` of one split.

    Unknown tokens are counted in all of it. What comes back from the ids is compared for documents spread over it.
    """
    texts: list[str] = []
    room = SAMPLE
    for index in np.random.default_rng(0).permutation(len(documents))[:SAMPLE]:
        text = documents[int(index)]["text"]
        if len(text) > room:
            if not texts:  # cut between words: half a word may be unknown
                texts.append((text[:room].rsplit(maxsplit=1) or [""])[0])
            break
        texts.append(text)
        room -= len(text)
    coverage = cover(tokenizer, texts, encode_arrays(tokenizer, texts))
    unknown = unknown_ids(tokenizer)
    if not unknown:
        return coverage.unknown_share, coverage.loss_of_text
    is_separator = data.separator is not None and unknown == [tokenizer.eos_token_id]
    count = tokens.count(unknown[0]) - is_separator * len(documents)
    text_tokens = len(tokens) - (data.separator is not None) * len(documents)
    whole = Coverage(text_tokens, count, f"{count:,} unknown tokens" if count else coverage.loss_of_text)
    return whole.unknown_share, whole.loss_of_text


def tokenize(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerFast, data: DataConfig, split: str
) -> TokenArray:
    """The ids of one split, memory-mapped."""
    encoder = WordEncoder(tokenizer)

    def encode_all() -> datasets.Dataset:
        return documents.map(
            encode_batch,
            batched=True,
            batch_size=256,
            input_columns=["text"],
            remove_columns=["text"],
            fn_kwargs={"encoder": encoder, "separator": data.separator},
            features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
            num_proc=None if data.num_proc == 1 else min(data.num_proc, len(documents)),
            new_fingerprint=cache_key(
                documents._fingerprint,
                tokenizer_hash(tokenizer),
                str(None if data.separator is None else tokenizer.eos_token_id),
            ),
            desc=f"Tokenizing the {split} text",
        )

    try:
        token_ids = encode_all()
    except DifferentIdsError as error:
        print_status(f"{error} Tokenizing again, each text in one piece.")
        encoder.is_cut_by_words = False
        token_ids = encode_all()
    return TokenArray(token_ids)


def make_rows(tokens: TokenArray, data: DataConfig, split: str) -> tuple[TokenRows, SplitCounts]:
    """Cut one split into rows, by `data.packing`, and count what became of its tokens.

    Raises:
        ValueError: it is shorter than one row.
    """
    block_size, documents = data.block_size, len(tokens.document_starts)
    first = 0 if data.separator is None else 1  # there is nothing before the first document to end
    count = len(tokens) - first
    if data.packing == "padded":
        rows = padded_rows(tokens, block_size)
        targets = count + 1  # the last document is ended too
        padding = len(rows) * block_size - targets
        return rows, SplitCounts(documents, len(rows), count, targets, remainder=0, padding=padding)
    if count < block_size + 1:
        raise ValueError(
            f"the {split} split has {count} tokens, fewer than one block of {block_size + 1} (`data.block_size` "
            f"and one): lower `data.block_size` ({block_size}) or give more text."
        )
    stride = data.stride or block_size
    starts = range(first, len(tokens) - block_size, stride)
    rows = TokenRows(tokens, block_size, starts, is_isolated=data.packing == "isolated")
    remainder = count - (len(rows) - 1) * stride - (block_size + 1)
    return rows, SplitCounts(documents, len(rows), count, len(rows) * block_size, remainder, padding=0)


def padded_rows(tokens: TokenArray, block_size: int) -> TokenRows:
    """Rows from the `<|endoftext|>` before a document to the one behind it; documents longer than T take several."""
    begins = tokens.document_starts
    ends = np.append(begins[1:], len(tokens))  # where the `<|endoftext|>` behind each stands; behind the last, nothing
    counts = -(-(ends - begins) // block_size)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # number of a row in its document
    starts = np.repeat(begins, counts) + nth * block_size
    stops = np.minimum(starts + block_size + 1, np.repeat(ends, counts) + 1)
    return TokenRows(tokens, block_size, starts, stops)


def cache_key(*parts: str) -> str:
    return hashlib.sha256(" ".join([f"hfgpt-rows-{ROWS_VERSION}", *parts]).encode()).hexdigest()[:32]


def encode_batch(texts: list[str], encoder: WordEncoder, separator: str | None) -> dict[str, list[np.ndarray]]:
    return {"input_ids": encoder.encode_documents(texts, separator)}


def load_text(config: RunConfig, resume_from: Path | None) -> tuple[PreTrainedTokenizerFast, Rows]:
    """The tokenizer of a run, or of the checkpoint that it resumes from, and its text as rows."""
    process = PartialState()
    if config.data.streaming:
        tokenizer = existing_tokenizer(config, resume_from)
        assert tokenizer is not None  # config.validation.check_streaming
        return tokenizer, stream_rows(config.data, tokenizer, config.seed, process.process_index, process.num_processes)
    documents = load_documents(config.data, config.seed)
    tokenizer = make_tokenizer(config, documents.train, resume_from)
    return tokenizer, load_rows(documents, tokenizer, config.data)


@dataclass(frozen=True)
class PreparedText:
    """A text that is ready to train on, and how long each step took: next to nothing, if the cache held its result."""

    train: SplitCounts
    validation: SplitCounts
    token_ids: int
    """How many the tokenizer knows."""
    reading_seconds: float
    tokenizer_seconds: float
    tokenizing_seconds: float


def prepare_text(config: RunConfig) -> PreparedText:
    """Read, tokenize and cache the text of a run, as its first step does, and count it.

    Raises:
        ValueError: the text is read as it comes, or cannot be read.
    """
    if config.data.streaming:
        raise ValueError("`data.streaming` reads the text as it comes: there is nothing to prepare.")
    started_at = time.perf_counter()
    documents = load_documents(config.data, config.seed)
    read_at = time.perf_counter()
    tokenizer = make_tokenizer(config, documents.train)
    trained_at = time.perf_counter()
    rows = load_rows(documents, tokenizer, config.data)
    done_at = time.perf_counter()
    return PreparedText(
        train=rows.train_counts,
        validation=rows.validation_counts,
        token_ids=len(tokenizer),
        reading_seconds=read_at - started_at,
        tokenizer_seconds=trained_at - read_at,
        tokenizing_seconds=done_at - trained_at,
    )


def render(prepared: PreparedText) -> str:
    """The counts and times as lines to read."""
    lines = [
        f"{name:<10}  {split.documents:,} documents, {split.tokens:,} tokens in {split.rows:,} rows: "
        f"{split.targets:,} targets, {split.remainder:,} tokens left over, {split.padding:,} places filled up, "
        f"{describe_unknown(split.unknown_share)}"
        for name, split in (("train", prepared.train), ("validation", prepared.validation))
    ]
    speed = (prepared.train.tokens + prepared.validation.tokens) / prepared.tokenizing_seconds
    times = (
        f"documents in {prepared.reading_seconds:.1f} s, tokenizer of {prepared.token_ids:,} ids in "
        f"{prepared.tokenizer_seconds:.1f} s, tokens in {prepared.tokenizing_seconds:.1f} s "
        f"({speed:,.0f} tokens/s; what is in the cache already takes no time)"
    )
    return "\n".join([*lines, times])


def existing_tokenizer(config: RunConfig, resume_from: Path | None = None) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a checkpoint, that which the recipe names, or that of its model; None if it is to be trained."""
    name = str(resume_from) if resume_from is not None else config.tokenizer.name or config.init_from
    if name is None:
        return None
    tokenizer = load_tokenizer(name)
    if config.data.separator is not None:
        purpose = "which goes between documents. Set `data.separator=null` to join them with nothing between."
        check_end_of_text(tokenizer, name, purpose)
    return tokenizer


def make_tokenizer(
    config: RunConfig, train_documents: Dataset, resume_from: Path | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer that there is, or one trained on the training split."""
    tokenizer = existing_tokenizer(config, resume_from)
    if tokenizer is not None:
        return tokenizer
    longest = build_model_config(config).max_position_embeddings
    texts = (text for batch in train_documents.iter(batch_size=1000) for text in batch["text"])
    return train_tokenizer(texts, config.tokenizer.vocab_size, model_max_length=longest)


def train_run_tokenizer(config: RunConfig) -> PreTrainedTokenizerFast:
    """Train the tokenizer that a run of this recipe would train.

    Raises:
        ValueError: the recipe names a tokenizer that is trained already, or its text cannot be read.
    """
    if config.tokenizer.name or config.init_from:
        raise ValueError(
            f"the recipe names a tokenizer that is trained already ({config.tokenizer.name or config.init_from!r})."
        )
    return make_tokenizer(config, load_documents(config.data, config.seed).train)
