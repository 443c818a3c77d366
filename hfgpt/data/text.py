"""The documents of a run: read losslessly from files, a Hub data set or Python's documentation, and split.

corpus.py and sources.py say which files they are, readers.py what their texts are. `load_documents` stores the text as
a whole; `stream_texts` reads it as it comes, for streaming.py.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError

from hfgpt.config.schema import DataConfig
from hfgpt.data import python_docs
from hfgpt.data.corpus import Corpus, find_files, leave_out_empty, print_left_out
from hfgpt.data.readers import TextFile, read_texts
from hfgpt.data.sources import download, find_source

TEXT = datasets.Features({"text": datasets.Value("string")})
READERS_VERSION = 1  # Part of the cache's key: raise it when the same file is to give other texts than before.


@dataclass(frozen=True)
class Documents:
    """The text of a run: one string column `text` each, no document empty."""

    train: datasets.Dataset
    validation: datasets.Dataset


def load_documents(data: DataConfig, seed: int) -> Documents:
    """Read the text of a run and split it.

    Documents are shuffled by `seed` if `data.shuffle_documents`; then the last `data.validation_fraction` of them, at
    least one, is the validation part. A single document is cut at a character. A validation part that `data` names is
    taken as it is, and nothing is cut off the training part.

    Raises:
        ValueError: a source that cannot be read, has no such column, holds anything but text, or too little of it.
    """
    if data.text_column != "text" and is_plain_text(data):
        raise ValueError(f"`data.text_column` ({data.text_column!r}) has no effect: plain text has no columns.")
    documents = read_source(data, data.files, data.split)
    validation = named_validation(data)
    if validation is not None:
        return Documents(shuffle(documents, data, seed), validation)
    if len(documents) == 1:
        text = documents[0]["text"]
        end = len(text) - held_out(len(text), "character", data)
        return Documents(store_list([text[:end]]), store_list([text[end:]]))
    end = len(documents) - held_out(len(documents), "document", data)
    documents = shuffle(documents, data, seed)
    return Documents(documents.select(range(end)), documents.select(range(end, len(documents))))


def named_validation(data: DataConfig) -> datasets.Dataset | None:
    """The validation text that `data` names, or None if it is to be held out of the training text."""
    if data.validation_files is None and data.validation_split is None:
        return None
    return read_source(data, data.validation_files, data.validation_split)


def shuffle(documents: datasets.Dataset, data: DataConfig, seed: int) -> datasets.Dataset:
    if not data.shuffle_documents:
        return documents
    return documents.select(np.random.default_rng(seed).permutation(len(documents)))


def held_out(count: int, unit: str, data: DataConfig) -> int:
    """How many of `count` documents or characters are the validation part, at least one on each side."""
    if count < 2:
        raise ValueError(f"the text is a single {unit}: there is nothing to split into training and validation text.")
    return min(max(round(count * data.validation_fraction), 1), count - 1)


def is_plain_text(data: DataConfig) -> bool:
    """Whether no part of the text comes from a table."""
    if data.source is not None:
        return data.source == "pydoc"
    named = [files for files in (data.files, data.validation_files) if files is not None]
    return all(file.kind == "text" for files in named for file in find_files(files).files)


def find_corpus(data: DataConfig, files: Any, split: str | None) -> Corpus:
    """The files of one split."""
    return find_files(files) if data.source is None else find_source(data.source, data.name, str(split))


def read_source(data: DataConfig, files: Any, split: str | None) -> datasets.Dataset:
    """Read the documents of one split, in the order of the source, without empty ones; say what is left out.

    Raises:
        ValueError: it cannot be read, has no such column, holds anything but text, or none.
    """
    if data.source == "pydoc":
        return store_list(list(python_docs.documents()))
    if data.source is None:
        return read_corpus(find_files(files), data.text_column)
    names = dict.fromkeys(part.partition("[")[0].strip() for part in str(split).split("+"))
    wholes = {name: read_corpus(find_corpus(data, files, name), data.text_column) for name in names}
    if split in wholes:
        return wholes[split]
    try:  # such as `train[:10%]` and `train+test`, here of the documents that are not empty
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(wholes[name]) for name in wholes})
    except ValueError as error:
        raise ValueError(f"{data.source} has no such split as {split!r}: {error}") from error
    chosen = datasets.concatenate_datasets(
        [wholes[part.splitname].select(range(part.from_, part.to)) for part in parts]
    )
    if len(chosen) == 0:
        raise ValueError(f"{split!r} of {data.source} holds no document.")
    return chosen


def read_corpus(corpus: Corpus, column: str) -> datasets.Dataset:
    """Read all files that hold text, and say which were left out."""
    corpus = download(corpus)
    leave_out_empty(corpus, column)
    print_left_out(corpus)
    return store_files(corpus.files, column)


def stream_texts(data: DataConfig, shuffle_seed: int | None) -> datasets.IterableDataset:
    """The training documents of a source, read as they come: one column `text`, empty ones left out.

    Args:
        data: names the source.
        shuffle_seed: fixes the order of the files, another one in each epoch; None leaves them as they are. Documents
            within a file are not shuffled.

    Raises:
        ValueError: a source that cannot be found; while it is read, a file or a row that `read_texts` refuses.
        OSError: while it is read, the source breaks off.
    """
    corpus = find_corpus(data, data.files, data.split)
    options = {"files": corpus.files, "column": data.text_column}
    stream = datasets.IterableDataset.from_generator(file_rows, features=TEXT, gen_kwargs=options)
    return stream if shuffle_seed is None else stream.shuffle(seed=shuffle_seed, buffer_size=1)


def check_stream(data: DataConfig) -> None:
    """Say what is left out of the files of a stream; of those on the Hub, which are not opened for that, nothing is.

    Raises:
        ValueError: there is no text in them.
    """
    corpus = find_corpus(data, data.files, data.split)
    if not any(file.is_remote for file in corpus.files):
        leave_out_empty(corpus, data.text_column)
        print_left_out(corpus)


def file_rows(files: list[TextFile], column: str) -> Iterator[dict[str, str]]:
    for file in files:
        for text in read_texts(file, column):
            yield {"text": text}


def store_files(files: list[TextFile], column: str) -> datasets.Dataset:
    """Write the texts of files to a memory-mapped cache file that is found again by the files' content."""
    return store_rows(partial(file_rows, files, column), partial(hash_files, files, column))


def store_list(texts: list[str]) -> datasets.Dataset:
    """Write texts to such a cache file."""
    rows = [{"text": text} for text in texts]
    return store_rows(lambda: rows, lambda: hash_parts(text.encode("utf-8") for text in texts))


def store_rows(rows: Callable[[], Iterable[dict[str, str]]], content: Callable[[], str]) -> datasets.Dataset:
    """Write rows, not none, to a memory-mapped cache file.

    Args:
        rows: gives them.
        content: gives a key to what they are made of. Asked again at the end, it gives the same.

    Raises:
        ValueError: what they are made of changed in between, or cannot be read.
        OSError: the cache cannot be written.
    """
    key = content()

    def unchanged_rows() -> Iterator[dict[str, str]]:
        yield from rows()
        if content() != key:
            raise ValueError("the text changed while it was read. Start again when nothing writes to its files.")

    try:
        return datasets.Dataset.from_generator(unchanged_rows, features=TEXT, fingerprint=key)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise ValueError(str(error.__cause__)) from error
        raise ValueError(f"the text cannot be stored: {error.__cause__}") from error


def hash_files(files: list[TextFile], column: str) -> str:
    """A key to the texts of files: how they are read, and every byte of them."""
    parts = [f"{READERS_VERSION} {column}".encode()]
    for file in files:
        with Path(file.path).open("rb") as opened:
            parts += [f"{file.kind} {file.is_compressed}".encode(), hashlib.file_digest(opened, "sha256").digest()]
    return hash_parts(parts)


def hash_parts(parts: Iterable[bytes]) -> str:
    content = hashlib.sha256()
    for part in parts:
        content.update(len(part).to_bytes(8, "big") + part)
    return content.hexdigest()[:32]
