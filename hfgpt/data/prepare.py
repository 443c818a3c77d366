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

from hfgpt.config.schema import DataConfig, RunConfig
from hfgpt.configuration_hfgpt import HFGPTConfig
from hfgpt.data.rows import TokenArray, TokenRows
from hfgpt.data.streaming import StreamedRows, hashes, sample_documents
from hfgpt.data.text import Documents, load_documents
from hfgpt.data.tokenizer import check_end_of_text, encode_documents, load_tokenizer, tokenizer_hash, train_tokenizer

ROWS_VERSION = 2  # Part of the cache's key: raise it when the same text is to give other ids than before.


@dataclass(frozen=True)
class SplitCounts:
    """What one split of a text has become."""

    documents: int
    """Documents that are not empty."""
    rows: int
    """Of `data.block_size` targets."""
    tokens: int
    """Ids of all documents, and one `<|endoftext|>` between two of them."""
    targets: int
    """Targets scored in one pass over the rows; with a `stride` below `block_size` some count more than once."""
    remainder: int
    """Tokens at the end that fill no row, fewer than `stride`; they are never scored."""
    padding: int
    """Places in rows that hold no target."""


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
    train, train_counts = make_rows(tokenize(documents.train, tokenizer, data, "training"), data, "training")
    tokens = tokenize(documents.validation, tokenizer, data, "validation")
    validation, validation_counts = make_rows(tokens, data, "validation")
    return Rows(train, validation, train_counts, validation_counts)


def tokenize(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerFast, data: DataConfig, split: str
) -> TokenArray:
    """The ids of one split, memory-mapped."""
    token_ids = documents.map(
        encode_batch,
        batched=True,
        batch_size=256,
        input_columns=["text"],
        remove_columns=["text"],
        fn_kwargs={"tokenizer": tokenizer},
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
        num_proc=None if data.num_proc == 1 else min(data.num_proc, len(documents)),
        new_fingerprint=cache_key(documents._fingerprint, tokenizer_hash(tokenizer), str(tokenizer.eos_token_id)),
        desc=f"Tokenizing the {split} text",
    )
    return TokenArray(token_ids)


def make_rows(tokens: TokenArray, data: DataConfig, split: str) -> tuple[TokenRows, SplitCounts]:
    """Cut one split into rows, by `data.packing`, and count what became of its tokens.

    Raises:
        ValueError: it is shorter than one row.
    """
    block_size, documents = data.block_size, len(tokens.document_starts)
    count = len(tokens) - 1  # there is nothing before the first document to end
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
    starts = range(1, len(tokens) - block_size, stride)
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


def encode_batch(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> dict[str, list[np.ndarray]]:
    return {"input_ids": encode_documents(tokenizer, texts)}


def check_ids(rows: TokenRows, vocab_size: int, name: str) -> None:
    """Refuse rows that a model cannot read, before its embedding fails on them.

    Raises:
        ValueError: `rows` hold an id of `vocab_size` or more.
    """
    largest = rows.tokens.largest()
    if largest >= vocab_size:
        raise ValueError(
            f"the {name} rows hold the id {largest}, but the model's `vocab_size` is {vocab_size}. "
            "Take the tokenizer that belongs to the model."
        )


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
        f"{split.targets:,} targets, {split.remainder:,} tokens left over, {split.padding:,} places filled up"
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
    check_end_of_text(tokenizer, name)
    return tokenizer


def make_tokenizer(
    config: RunConfig, train_documents: Dataset, resume_from: Path | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer that there is, or one trained on the training split."""
    tokenizer = existing_tokenizer(config, resume_from)
    if tokenizer is not None:
        return tokenizer
    longest = HFGPTConfig(**config.model).max_position_embeddings
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
