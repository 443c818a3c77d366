"""In which order a run sees its rows, and how they become micro-batches.

Shape letters: B rows of a micro-batch, T `block_size`.
"""

import math
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from hfgpt.data.rows import TokenRows
from hfgpt.data.streaming import StreamedRows


def collate(rows: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Stack rows of T + 1 ids into a micro-batch.

    Returns:
        `input_ids`, `labels` (the same ids) and `shift_labels` (the next ids), each (B, T) int64; and `position_ids`
        (B, T), if the rows have any. What fills up has -100 as its labels.
    """
    ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows])).long()
    labels, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()  # for a view a GPU's copy would be waited for
    batch = {"input_ids": labels.clamp(min=0), "labels": labels, "shift_labels": targets}
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


def stream_loader(rows: StreamedRows, batch_size: int, pin_memory: bool = False) -> DataLoader[dict[str, np.ndarray]]:
    """Micro-batches of a stream, without end; they go on where `rows` is."""
    return DataLoader(rows, batch_size, collate_fn=collate, generator=torch.Generator(), pin_memory=pin_memory)


def train_loader(
    rows: TokenRows,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[dict[str, np.ndarray]]:
    """Micro-batches of shuffled rows; `loader.batch_sampler` is the `EpochBatches` that says of which epoch.

    With `pin_memory` they lie where a GPU can fetch them by itself, while the program goes on.
    """
    return DataLoader(
        rows,
        batch_sampler=EpochBatches(len(rows), batch_size, seed, rank, world_size),
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=outlive_one_sigterm,
        generator=torch.Generator(),  # Its own, so that starting an epoch draws nothing from the RNG dropout uses.
        pin_memory=pin_memory,
    )


def outlive_one_sigterm(worker: int) -> None:
    """Let a worker live through the SIGTERM that a service manager sends to all processes of a run at once.

    torch (2.13) lets it die of that, and the training process with it, which needs it for the step that it finishes.
    The next SIGTERM, which is the training process's own at its end, is obeyed.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def start_at(loader: DataLoader[dict[str, np.ndarray]], epoch: int, number: int) -> None:
    """Begin the next iteration with micro-batch `number` of an epoch; a stream continues where it is."""
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
