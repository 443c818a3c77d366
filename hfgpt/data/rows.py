"""Rows of token ids: slices of one memory-mapped array, so that making them copies nothing.

The array of a split holds every document behind its `<|endoftext|>`: e d1 d1 d1 e d2 d2 e ... Where `data.separator` is
null, it holds the documents alone.

Shape letters: N rows, T `block_size`.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import datasets
import numpy as np
import torch

from hfgpt.loss import IGNORE_INDEX


class TokenArray:
    """The ids of all documents, each behind an end-of-text if they are separated, as one int32 array.

    Args:
        token_ids: memory-mapped, with one column `input_ids`: a list of ids for each document.
    """

    def __init__(self, token_ids: datasets.Dataset) -> None:
        self.parts: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        length = 0
        for chunk in token_ids.data.column("input_ids").chunks:
            ids = chunk.flatten().to_numpy()  # of the chunk's own part of the file, without a copy
            offsets = chunk.offsets.to_numpy()
            starts.append(offsets[:-1].astype(np.int64) - offsets[0] + length)
            self.parts.append(ids)
            length += len(ids)
        self.part_ends = np.cumsum([len(part) for part in self.parts]).tolist()
        self.document_starts = np.concatenate(starts) if starts else np.empty(0, dtype=np.int64)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def slice(self, start: int, stop: int) -> np.ndarray:
        """The ids from `start` to before `stop`: a view, or a copy where they lie in two parts of the file.

        One id more than the array holds may be asked for: an end-of-text behind the last document.
        """
        pieces = []
        part = bisect_right(self.part_ends, start)
        while start < min(stop, self.length):
            begin = self.part_ends[part - 1] if part else 0
            piece = self.parts[part][start - begin : stop - begin]
            pieces.append(piece)
            start += len(piece)
            part += 1
        if stop > self.length:
            pieces.append(self.parts[0][:1])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def count(self, token_id: int) -> int:
        """How often an id is there."""
        return sum(int((part == token_id).sum()) for part in self.parts)


class TokenRows(torch.utils.data.Dataset[dict[str, np.ndarray]]):
    """Rows by index, as `input_ids` of shape (T + 1,); the index after the last one is a filler without a target.

    With fillers every process runs as many micro-batches as the others when the rows do not divide evenly.

    Args:
        tokens: that the rows are slices of.
        block_size: targets in a row, T.
        starts: where in them each row begins, (N,).
        stops: where it ends at the latest, (N,); shorter rows are filled up. None: all are whole.
        is_isolated: whether rows come with `position_ids` (T,), which begin again with each document.
    """

    def __init__(
        self,
        tokens: TokenArray,
        block_size: int,
        starts: Sequence[int] | np.ndarray,
        stops: np.ndarray | None = None,
        is_isolated: bool = False,
    ) -> None:
        self.tokens, self.block_size, self.starts, self.stops = tokens, block_size, starts, stops
        self.is_isolated = is_isolated

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield every row, without the filler, which Python would find by counting up."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index == len(self):
            ids, start = np.empty(0, dtype=np.int32), 0
        elif not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} rows, got {index}.")
        else:
            start = int(self.starts[index])
            ids = self.tokens.slice(
                start, start + self.block_size + 1 if self.stops is None else int(self.stops[index])
            )
        row = {"input_ids": fill_row(ids, self.block_size)}
        if self.is_isolated:
            row["position_ids"] = self.positions(start)
        return row

    def positions(self, start: int) -> np.ndarray:
        """Positions (T,) of a row that begins at `start`."""
        starts = self.tokens.document_starts
        first, last = np.searchsorted(starts, [start + 1, start + self.block_size])
        is_begin = np.zeros(self.block_size, dtype=bool)
        is_begin[starts[first:last] - start] = True
        return restarting_positions(is_begin)

    def part(self, start: int, stop: int) -> "TokenRows":
        """The rows from `start` to before `stop`."""
        stops = None if self.stops is None else self.stops[start:stop]
        return TokenRows(self.tokens, self.block_size, self.starts[start:stop], stops, self.is_isolated)

    def pairs(self) -> np.ndarray:
        """Every target behind the id before it, int32 (targets, 2)."""
        rows = np.stack([row["input_ids"] for row in self])
        pairs = np.stack([rows[:, :-1].ravel(), rows[:, 1:].ravel()], axis=1)
        return pairs[pairs[:, 1] != IGNORE_INDEX]


def fill_row(ids: np.ndarray, block_size: int) -> np.ndarray:
    """At most T + 1 ids as exactly T + 1; what is missing is -100, which is no target."""
    missing = block_size + 1 - len(ids)
    return np.concatenate([ids, np.full(missing, IGNORE_INDEX, dtype=np.int32)]) if missing else ids


def restarting_positions(is_begin: np.ndarray) -> np.ndarray:
    """Positions (T,) that count from 0, and again from 0 wherever a document begins, bool (T,)."""
    place = np.arange(len(is_begin))
    return place - np.maximum.accumulate(np.where(is_begin, place, 0))
