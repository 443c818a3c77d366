"""Text to rows of token ids, on `datasets`; and in which order a run sees the rows.

Documents are tokenized losslessly into one stream with `<|endoftext|>` between them. The stream is cut into rows of
T + 1 ids that overlap by one, so that each row has T targets and no target is skipped.

Shape letters: B rows of a micro-batch, T `block_size`.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerFast

from hfgpt.config import DataConfig
from hfgpt.documents import Documents as Documents
from hfgpt.documents import load_documents as load_documents
from hfgpt.loss import IGNORE_INDEX
from hfgpt.tokenizer import encode_arrays, tokenizer_hash

ROWS_VERSION = 1  # Part of the cache's key: raise it when the same text shall give other rows than before.


@dataclass(frozen=True)
class SplitCounts:
    """What became of the tokens of one split."""

    tokens: int
    """Length of the stream, with the `<|endoftext|>` between documents."""
    targets: int
    """Targets scored in one pass over the rows; with a `stride` below `block_size` some count more than once."""
    remainder: int
    """Tokens at the end that fill no row, fewer than `stride`; they are never scored."""


@dataclass(frozen=True)
class Rows:
    """The rows of a run: memory-mapped, with one column `input_ids` of T + 1 int32 ids."""

    train: datasets.Dataset
    validation: datasets.Dataset
    train_counts: SplitCounts
    validation_counts: SplitCounts


def load_rows(documents: Documents, tokenizer: PreTrainedTokenizerFast, data: DataConfig) -> Rows:
    """Tokenize documents and cut them into rows; both are done once and then read from the cache of `datasets`.

    The cache's key is made of the text, the tokenizer and the settings. Of several processes, let one call this first.

    Raises:
        ValueError: a split is shorter than one row.
    """
    train, train_counts = cut_rows(documents.train, tokenizer, data, "training")
    validation, validation_counts = cut_rows(documents.validation, tokenizer, data, "validation")
    return Rows(train, validation, train_counts, validation_counts)


def cut_rows(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerFast, data: DataConfig, split: str
) -> tuple[datasets.Dataset, SplitCounts]:
    """Make the rows of one split, and count its tokens."""
    stride = data.stride or data.block_size
    token_key = cache_key(documents._fingerprint, tokenizer_hash(tokenizer))
    token_ids = documents.map(
        encode_batch,
        batched=True,
        batch_size=256,
        input_columns=["text"],
        remove_columns=["text"],
        fn_kwargs={"tokenizer": tokenizer},
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
        num_proc=None if data.num_proc == 1 else min(data.num_proc, len(documents)),
        new_fingerprint=token_key,
        desc=f"Tokenizing the {split} text",
    )
    ids_of_documents = sum(len(chunk.flatten()) for chunk in token_ids.data.column("input_ids").chunks)
    tokens = ids_of_documents + len(documents) - 1
    if tokens < data.block_size + 1:
        raise ValueError(
            f"the {split} split has {tokens} tokens, fewer than one block of {data.block_size + 1} (`data.block_size` "
            f"and one): lower `data.block_size` ({data.block_size}) or give more text."
        )
    rows = datasets.Dataset.from_generator(
        token_rows,
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=data.block_size + 1)}),
        gen_kwargs={
            "token_ids": token_ids,
            "end_id": tokenizer.eos_token_id,
            "length": data.block_size + 1,
            "stride": stride,
        },
        fingerprint=cache_key(token_key, str(data.block_size), str(stride)),
    )
    targets = len(rows) * data.block_size
    remainder = tokens - (len(rows) - 1) * stride - (data.block_size + 1)
    return rows, SplitCounts(tokens, targets, remainder)


def cache_key(*parts: str) -> str:
    return hashlib.sha256(" ".join([f"hfgpt-rows-{ROWS_VERSION}", *parts]).encode()).hexdigest()[:32]


def encode_batch(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> dict[str, list[np.ndarray]]:
    return {"input_ids": encode_arrays(tokenizer, texts)}


def token_rows(token_ids: datasets.Dataset, end_id: int, length: int, stride: int) -> Iterator[dict[str, np.ndarray]]:
    """Join documents into one stream with `end_id` between them, and yield `length` ids from every `stride`-th on."""
    stream = np.empty(0, dtype=np.int32)
    for number, batch in enumerate(token_ids.with_format("arrow").iter(batch_size=64)):
        column = batch["input_ids"].combine_chunks()
        starts = column.offsets.to_numpy()[:-1] - column.offsets[0].as_py()
        joined = np.insert(column.flatten().to_numpy(), starts if number else starts[1:], end_id)
        stream = np.concatenate([stream, joined])
        count = max(0, (len(stream) - length) // stride + 1)
        for start in range(0, count * stride, stride):
            yield {"input_ids": stream[start : start + length]}
        stream = stream[count * stride :]


def check_ids(rows: datasets.Dataset, vocab_size: int, name: str) -> None:
    """Refuse rows that a model cannot read, before its embedding fails on them.

    Raises:
        ValueError: `rows` hold an id of `vocab_size` or more.
    """
    largest = max(chunk.flatten().to_numpy().max() for chunk in rows.data.column("input_ids").chunks)
    if largest >= vocab_size:
        raise ValueError(
            f"the {name} rows hold the id {largest}, but the model's `vocab_size` is {vocab_size}. "
            "Take the tokenizer that belongs to the model."
        )


class TrainingRows(torch.utils.data.Dataset[dict[str, np.ndarray]]):
    """Rows by index, as `input_ids` of shape (T + 1,); the index after the last one is a filler that nothing counts.

    A filler lets every process run as many micro-batches as the others when the rows do not divide evenly.
    """

    def __init__(self, rows: datasets.Dataset):
        self.rows = rows.with_format("arrow")
        self.filler = np.full(rows.features["input_ids"].length, IGNORE_INDEX, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, np.ndarray]]:
        real = [index for index in indices if index != len(self)]
        found = iter(())
        if real:
            ids = self.rows[real]["input_ids"].combine_chunks().flatten().to_numpy()
            found = iter(ids.reshape(len(real), -1))
        return [{"input_ids": self.filler if index == len(self) else next(found)} for index in indices]


def collate(rows: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Stack rows of T + 1 ids into a micro-batch.

    Returns:
        `input_ids`, `labels` (the same ids) and `shift_labels` (the next ids), each (B, T) int64. The labels of a
        filler row are all -100.
    """
    ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows])).long()
    return {"input_ids": ids[:, :-1].clamp(min=0), "labels": ids[:, :-1], "shift_labels": ids[:, 1:]}


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


def train_loader(
    rows: datasets.Dataset, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, num_workers: int = 0
) -> DataLoader[dict[str, np.ndarray]]:
    """Micro-batches of shuffled rows; `loader.batch_sampler` is the `EpochBatches` that says of which epoch."""
    return DataLoader(
        TrainingRows(rows),
        batch_sampler=EpochBatches(len(rows), batch_size, seed, rank, world_size),
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator(),  # Its own, so that starting an epoch draws nothing from the RNG dropout uses.
    )


def eval_loader(
    rows: datasets.Dataset, batch_size: int, rank: int = 0, world_size: int = 1
) -> DataLoader[dict[str, np.ndarray]]:
    """Micro-batches of all rows in order; over all processes each row comes exactly once."""
    return DataLoader(
        TrainingRows(rows),
        batch_sampler=list(rank_batches(np.arange(len(rows)), batch_size, rank, world_size)),
        collate_fn=collate,
        generator=torch.Generator(),
    )
