"""Rows from text that is read as it comes, for sets larger than the disk; they go on exactly where they stopped.

Each process reads its own share of the documents, again and again, shuffles them through a buffer, and cuts them into
the same rows as hfgpt/data/rows.py. All that decides what comes next is in `StreamedRows.state_dict`.

Shape letters: T `block_size`.
"""

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from hfgpt.config.schema import DataConfig
from hfgpt.data.rows import fill_row, restarting_positions
from hfgpt.data.text import Documents, check_stream, named_validation, stream_texts
from hfgpt.data.words import WordEncoder

READ_AT_ONCE = 64  # documents that are tokenized together


def sample_documents(data: DataConfig, seed: int) -> Documents:
    """The validation text of a stream, and as many of its training documents to be scored beside it.

    The validation text is what `data` names, or the first `data.validation_documents` of the source. Whatever equals
    one of its documents is no training text: see `StreamedRows`.

    Raises:
        ValueError: the source holds fewer documents than that.
    """
    check_stream(data)
    validation = named_validation(data)
    if validation is None:
        first = [row["text"] for row in stream_texts(data, shuffle_seed=None).take(data.validation_documents)]
        if len(first) < data.validation_documents:
            raise ValueError(
                f"the source has {len(first)} documents, `data.validation_documents` are {data.validation_documents}. "
                "So small a source needs no `data.streaming`."
            )
        validation = datasets.Dataset.from_dict({"text": first})
    held_out = hashes(validation)
    texts: list[str] = []
    for example in stream_texts(data, shuffle_seed=seed if data.shuffle_documents else None):
        if len(texts) == len(validation):
            break
        if text_hash(example["text"]) not in held_out:
            texts.append(example["text"])
    if not texts:
        raise ValueError("the source holds no document beside those of the validation text.")
    return Documents(datasets.Dataset.from_dict({"text": texts}), validation)


def hashes(documents: datasets.Dataset) -> frozenset[bytes]:
    return frozenset(text_hash(text) for text in documents["text"])


def text_hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


class StreamedRows(torch.utils.data.IterableDataset[dict[str, np.ndarray]]):
    """The training rows of one process, without end: after the last document the first ones come again.

    Args:
        data: where the text comes from, and how it becomes rows.
        held_out: `text_hash` of the documents to leave out, those of the validation text.
        tokenizer: with an end-of-text token, unless `data.separator` is None.
        seed: of the run; fixes the order.
        rank: number of this process, from 0.
        world_size: number of processes. Each reads shards of its own if they divide evenly, else every
            `world_size`-th document.
    """

    def __init__(
        self,
        data: DataConfig,
        held_out: frozenset[bytes],
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.data, self.held_out, self.tokenizer = data, held_out, tokenizer
        self.encoder = WordEncoder(tokenizer)
        documents = stream_texts(data, shuffle_seed=seed if data.shuffle_documents else None)
        # `split_dataset_by_node` (datasets 5.2) gives all to one process where shards do not divide evenly.
        has_own_shards = documents.num_shards % world_size == 0
        if has_own_shards:
            documents = documents.shard(world_size, rank)
        self.first, self.every = (0, 1) if has_own_shards else (rank, world_size)
        self.documents = documents.batch(READ_AT_ONCE)
        self.capacity = data.shuffle_buffer if data.shuffle_documents else 1
        self.epoch = 0
        self.random = np.random.default_rng([seed, rank])
        self.source: Iterator[dict[str, list[str]]] | None = None
        self.read = 0  # documents of this epoch, those of other processes included
        self.has_given = False  # whether this epoch has given any training text
        self.arrived: list[np.ndarray] = []  # tokenized, not yet in the buffer; the next one comes last
        self.buffer: list[np.ndarray] = []
        self.ids = np.empty(0, dtype=np.int32)  # not yet cut into rows
        self.begins = np.empty(0, dtype=bool)  # of each of them, whether a document begins there

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield rows as `hfgpt.data.rows.TokenRows` gives them."""
        cut = self.padded_row if self.data.packing == "padded" else self.packed_row
        while True:
            yield cut()

    def packed_row(self) -> dict[str, np.ndarray]:
        """T + 1 ids; the last one comes again as the first of the next row."""
        block_size = self.data.block_size
        while len(self.ids) < block_size + 1:
            self.append(self.next_document())
        row: dict[str, np.ndarray] = {"input_ids": self.ids[: block_size + 1]}
        if self.data.packing == "isolated":
            row["position_ids"] = restarting_positions(self.begins[:block_size])
        self.ids, self.begins = self.ids[block_size:], self.begins[block_size:]
        return row

    def padded_row(self) -> dict[str, np.ndarray]:
        """T + 1 ids of one document; what the document does not fill is -100."""
        block_size = self.data.block_size
        if len(self.ids) < 2:  # a document ends in its end-of-text, which is no beginning of another row
            self.ids = np.append(self.next_document(), np.int32(self.tokenizer.eos_token_id))
        ids = self.ids[: block_size + 1]
        self.ids = self.ids[block_size:]
        return {"input_ids": fill_row(ids, block_size)}

    def append(self, ids: np.ndarray) -> None:
        self.ids = np.concatenate([self.ids, ids])
        self.begins = np.concatenate([self.begins, np.arange(len(ids)) == 0])

    def next_document(self) -> np.ndarray:
        """The ids of a document behind its separator, drawn from the buffer."""
        while len(self.buffer) < self.capacity and self.arrive():
            self.buffer.append(self.arrived.pop())
        if not self.buffer:
            self.begin_epoch()
            return self.next_document()
        drawn = int(self.random.integers(len(self.buffer))) if self.capacity > 1 else 0
        self.buffer[drawn], self.buffer[-1] = self.buffer[-1], self.buffer[drawn]
        return self.buffer.pop()

    def begin_epoch(self) -> None:
        """Start the source again, unless it has given nothing at all."""
        if self.source is not None and not self.has_given:
            raise ValueError(f"{self.data.source or self.data.files} gives this process no training text.")
        if self.source is not None:
            self.epoch += 1
        self.documents.set_epoch(self.epoch)
        self.source, self.read, self.has_given = iter(self.documents), 0, False

    def arrive(self) -> bool:
        """Have a tokenized document at hand; False at the end of the source."""
        if self.source is None:
            self.begin_epoch()
        assert self.source is not None
        while not self.arrived:
            try:
                batch = next(self.source, None)
            except OSError as error:
                raise OSError(f"{error}. The run goes on with `--resume`.") from error
            if batch is None:
                return False
            own = batch["text"][(self.first - self.read) % self.every :: self.every]
            self.read += len(batch["text"])
            texts = [text for text in own if text_hash(text) not in self.held_out]
            self.arrived = self.encoder.encode_documents(texts, self.data.separator)[::-1]
            self.has_given = self.has_given or bool(texts)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides which rows come next, in types that torch loads without running code."""
        return {
            "epoch": self.epoch,
            "source": None if self.source is None else self.documents.state_dict(),
            "read": self.read,
            "has_given": self.has_given,
            "random": self.random.bit_generator.state,
            "arrived": pack(self.arrived),
            "buffer": pack(self.buffer),
            "ids": torch.from_numpy(self.ids.copy()),
            "begins": torch.from_numpy(self.begins.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was asked for."""
        # datasets (5.2) warns of the content of its shuffle buffer. It holds nothing here: `buffer` does.
        logging.getLogger("datasets.iterable_dataset").addFilter(lambda record: "shuffle buffer" not in record.msg)
        self.epoch = state["epoch"]
        self.source = None
        if state["source"] is not None:
            self.documents.set_epoch(self.epoch)
            self.documents.load_state_dict(state["source"])
            self.source = iter(self.documents)
        self.read, self.has_given = state["read"], state["has_given"]
        self.random.bit_generator.state = state["random"]
        self.arrived, self.buffer = unpack(state["arrived"]), unpack(state["buffer"])
        self.ids, self.begins = state["ids"].numpy(), state["begins"].numpy()


def pack(arrays: list[np.ndarray]) -> dict[str, Any]:
    joined = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32)
    return {"ids": torch.from_numpy(joined), "lengths": [len(array) for array in arrays]}


def unpack(packed: dict[str, Any]) -> list[np.ndarray]:
    if not packed["lengths"]:
        return []
    return np.split(packed["ids"].numpy(), np.cumsum(packed["lengths"])[:-1])
