"""Text to rows of token ids, on `datasets`; and in which order a run sees the rows.

Documents are tokenized losslessly, once, into a stream with `<|endoftext|>` between them (hfgpt/rows.py). Rows are
T + 1 ids of it that overlap by one, so that each has T targets and no target is skipped.

Shape letters: B rows of a micro-batch, T `block_size`.
"""

import hashlib
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerFast

from hfgpt.config.schema import DataConfig
from hfgpt.documents import Documents as Documents
from hfgpt.documents import load_documents as load_documents
from hfgpt.rows import TokenRows, TokenStream
from hfgpt.streaming import RowStream, hashes, sample_documents
from hfgpt.tokenizer import encode_arrays, tokenizer_hash

ROWS_VERSION = 2  # Part of the cache's key: raise it when the same text shall give other ids than before.


@dataclass(frozen=True)
class SplitCounts:
    """What became of the tokens of one split."""

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
    """Those to train on; with `stream` only some of them, to be scored beside the validation rows."""
    validation: TokenRows
    train_counts: SplitCounts
    validation_counts: SplitCounts
    stream: RowStream | None = None
    """Where the rows to train on come from, if they are not stored; this process's share."""


def stream_rows(data: DataConfig, tokenizer: PreTrainedTokenizerFast, seed: int, rank: int, world_size: int) -> Rows:
    """The rows of a text that is read as it comes, this process's share.

    Raises:
        ValueError: the source cannot be read, or the validation text is shorter than one row.
    """
    samples = sample_documents(data, seed)
    stream = RowStream(data, hashes(samples.validation), tokenizer, seed, rank, world_size)
    return replace(load_rows(samples, tokenizer, data), stream=stream)


def load_rows(documents: Documents, tokenizer: PreTrainedTokenizerFast, data: DataConfig) -> Rows:
    """Tokenize documents, which is done once and then read from the cache of `datasets`, and lay rows over them.

    The cache's key is made of the text and the tokenizer. Of several processes, let one call this first.

    Raises:
        ValueError: a split is shorter than one row.
    """
    train, train_counts = lay_rows(tokenize(documents.train, tokenizer, data, "training"), data, "training")
    validation, validation_counts = lay_rows(
        tokenize(documents.validation, tokenizer, data, "validation"), data, "validation"
    )
    return Rows(train, validation, train_counts, validation_counts)


def tokenize(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerFast, data: DataConfig, split: str
) -> TokenStream:
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
    return TokenStream(token_ids)


def lay_rows(stream: TokenStream, data: DataConfig, split: str) -> tuple[TokenRows, SplitCounts]:
    """The rows of one split, by `data.packing`, and what became of its tokens.

    Raises:
        ValueError: it is shorter than one row.
    """
    block_size, tokens = data.block_size, len(stream) - 1  # there is nothing before the first document to end
    if data.packing == "padded":
        rows = one_document_a_row(stream, block_size)
        targets = tokens + 1  # the last document is ended too
        return rows, SplitCounts(tokens, targets, remainder=0, padding=len(rows) * block_size - targets)
    if tokens < block_size + 1:
        raise ValueError(
            f"the {split} split has {tokens} tokens, fewer than one block of {block_size + 1} (`data.block_size` "
            f"and one): lower `data.block_size` ({block_size}) or give more text."
        )
    stride = data.stride or block_size
    starts = range(1, len(stream) - block_size, stride)
    rows = TokenRows(stream, block_size, starts, is_isolated=data.packing == "isolated")
    remainder = tokens - (len(rows) - 1) * stride - (block_size + 1)
    return rows, SplitCounts(tokens, len(rows) * block_size, remainder, padding=0)


def one_document_a_row(stream: TokenStream, block_size: int) -> TokenRows:
    """Rows from the `<|endoftext|>` before a document to the one behind it; documents longer than T take several."""
    begins = stream.document_starts
    ends = np.append(begins[1:], len(stream))  # where the `<|endoftext|>` behind each stands; behind the last, nothing
    counts = -(-(ends - begins) // block_size)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # number of a row in its document
    starts = np.repeat(begins, counts) + nth * block_size
    stops = np.minimum(starts + block_size + 1, np.repeat(ends, counts) + 1)
    return TokenRows(stream, block_size, starts, stops)


def cache_key(*parts: str) -> str:
    return hashlib.sha256(" ".join([f"hfgpt-rows-{ROWS_VERSION}", *parts]).encode()).hexdigest()[:32]


def encode_batch(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> dict[str, list[np.ndarray]]:
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    return {"input_ids": [np.concatenate([end, ids]) for ids in encode_arrays(tokenizer, texts)]}


def check_ids(rows: TokenRows, vocab_size: int, name: str) -> None:
    """Refuse rows that a model cannot read, before its embedding fails on them.

    Raises:
        ValueError: `rows` hold an id of `vocab_size` or more.
    """
    largest = rows.stream.largest()
    if largest >= vocab_size:
        raise ValueError(
            f"the {name} rows hold the id {largest}, but the model's `vocab_size` is {vocab_size}. "
            "Take the tokenizer that belongs to the model."
        )


def collate(rows: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Stack rows of T + 1 ids into a micro-batch.

    Returns:
        `input_ids`, `labels` (the same ids) and `shift_labels` (the next ids), each (B, T) int64; and `position_ids`
        (B, T), if the rows have any. What fills up has -100 as its labels.
    """
    ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows])).long()
    batch = {"input_ids": ids[:, :-1].clamp(min=0), "labels": ids[:, :-1], "shift_labels": ids[:, 1:]}
    if "position_ids" in rows[0]:
        batch["position_ids"] = torch.from_numpy(np.stack([row["position_ids"] for row in rows]))
    return batch


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the rows in an epoch, a permutation of shape (num_rows,) that depends on nothing else."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def rank_batches(order: np.ndarray, batch_size: int, rank: int, world_size: int, start: int = 0) -> Iterator[list[int]]:
    """Yield this process's share of each global micro-batch from number `start` on.

    A global micro-batch is the next `batch_size * world_size` rows of `order`, whatever the number of processes; each
    takes every `world_size`-th of them. All get as many; where rows run out, the index `len(order)` asks for a filler.
    """
    whole = batch_size * world_size
    for first in range(start * whole, len(order), whole):
        rows = order[first : first + whole]
        own = rows[rank::world_size].tolist()
        yield own + [len(order)] * (math.ceil(len(rows) / world_size) - len(own))


class EpochBatches(Sampler[list[int]]):
    """Row indices of each micro-batch of an epoch, shuffled by `epoch_order`; set `epoch` and `start` before iterating.

    Args:
        num_rows: rows there are.
        batch_size: rows per process and micro-batch.
        seed: of the run.
        rank: number of this process, from 0.
        world_size: number of processes.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        """Micro-batches of a whole epoch, wherever it starts; the same on every process."""
        return math.ceil(self.num_rows / (self.batch_size * self.world_size))

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.epoch = epoch
        self.start = 0

    def skip_to(self, start: int) -> None:
        """Leave out the first `start` micro-batches of this epoch: they are done already."""
        if not 0 <= start <= len(self):
            raise ValueError(f"an epoch has {len(self)} micro-batches, got {start} to leave out.")
        self.start = start

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.num_rows, self.seed, self.epoch)
        return rank_batches(order, self.batch_size, self.rank, self.world_size, self.start)


def stream_loader(rows: RowStream, batch_size: int) -> DataLoader[dict[str, np.ndarray]]:
    """Micro-batches of a stream, without end; they go on where `rows` stands."""
    return DataLoader(rows, batch_size, collate_fn=collate, generator=torch.Generator())


def train_loader(
    rows: TokenRows, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, num_workers: int = 0
) -> DataLoader[dict[str, np.ndarray]]:
    """Micro-batches of shuffled rows; `loader.batch_sampler` is the `EpochBatches` that says of which epoch."""
    return DataLoader(
        rows,
        batch_sampler=EpochBatches(len(rows), batch_size, seed, rank, world_size),
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=outlive_one_sigterm,
        generator=torch.Generator(),  # Its own, so that starting an epoch draws nothing from the RNG dropout uses.
    )


def outlive_one_sigterm(worker: int) -> None:
    """Let a worker live through the SIGTERM that a service manager sends to all processes of a run at once.

    torch (2.13) lets it die of that, and the training process with it, which needs it for the step that it finishes.
    The next SIGTERM, which is the training process's own at its end, is obeyed.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def start_at(loader: DataLoader[dict[str, np.ndarray]], epoch: int, number: int) -> None:
    """Let the next iteration begin with micro-batch `number` of an epoch; a stream stays where it stands."""
    if isinstance(loader.batch_sampler, EpochBatches):
        loader.batch_sampler.set_epoch(epoch)
        loader.batch_sampler.skip_to(number)


def eval_loader(
    rows: TokenRows, batch_size: int, rank: int = 0, world_size: int = 1
) -> DataLoader[dict[str, np.ndarray]]:
    """Micro-batches of all rows in order; over all processes each row comes exactly once."""
    return DataLoader(
        rows,
        batch_sampler=list(rank_batches(np.arange(len(rows)), batch_size, rank, world_size)),
        collate_fn=collate,
        generator=torch.Generator(),
    )
