"""Where a run's text comes from: files, a Hub data set, Python's documentation; read losslessly, and split.

`load_documents` stores the text as a whole; `stream_texts` reads it as it comes, for streaming.py.
"""

import glob
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError, DatasetsError

from hfgpt.config.schema import DataConfig
from hfgpt.data import python_docs
from hfgpt.system.network import limit_waiting

# How files are read: as one document each, or by the loader of `datasets` of that name.
FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
TEXT = datasets.Features({"text": datasets.Value("string")})


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
        return Documents(store_texts(partial(iter, [text[:end]])), store_texts(partial(iter, [text[end:]])))
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
    return all(file_format(path) == "text" for files in named for path in find_files(files))


def read_source(data: DataConfig, files: Any, split: str | None) -> datasets.Dataset:
    """Read the documents of one split, in the order of the source, without empty ones."""
    if data.source is None:
        parts = read_files(find_files(files), data.text_column)
    elif data.source == "pydoc":
        texts = list(python_docs.documents())
        parts = [store_texts(partial(iter, texts))]
    else:
        table = load_table(data.source, data.source, data.name, split=split)
        parts = [select_texts(table, data.text_column, f"{data.source} ({split})")]
    parts = [part for part in parts if len(part) > 0]
    if not parts:
        raise ValueError(f"{data.source or files} holds no text: every document is empty.")
    return datasets.concatenate_datasets(parts)


def find_files(files: Any) -> list[Path]:
    """List the files that paths and folders name; folders in sorted order, their files of other kinds left out.

    Raises:
        ValueError: a path that does not exist, a file of an unknown kind, or a folder without any of a known one.
    """
    entries = files if isinstance(files, list | tuple) else [files]
    if not entries or not all(isinstance(entry, str | Path) for entry in entries):
        raise ValueError(f"`data.files` and `data.validation_files` must be a path or a list of paths, got {files!r}.")
    paths: list[Path] = []
    for entry in map(Path, entries):
        if entry.is_dir():
            found = sorted(path for path in entry.rglob("*") if path.is_file() and file_format(path))
            if not found:
                raise ValueError(f"the folder {entry} holds no file that ends in {', '.join(FORMATS)}.")
            paths += found
        elif not entry.is_file():
            raise ValueError(f"there is no file or folder {str(entry)!r}.")
        elif not file_format(entry):
            raise ValueError(f"{entry}: the name must end in one of {', '.join(FORMATS)}, got {entry.suffix!r}.")
        else:
            paths.append(entry)
    return paths


def file_format(path: Path) -> str | None:
    return FORMATS.get(path.suffix.lower())


def read_files(paths: list[Path], column: str) -> list[datasets.Dataset]:
    """Read files, keeping their order: neighbouring plain texts as one part, every table as one."""
    parts: list[datasets.Dataset] = []
    filled = (path for path in paths if path.stat().st_size > 0)  # The JSON loader trips over empty files.
    for file_kind, group in groupby(filled, key=file_format):
        if file_kind == "text":
            # The text loader of `datasets` (5.2) turns CRLF into LF; a document is to stay as it is.
            parts.append(store_texts(partial(read_texts, list(group))))
        else:
            parts += [read_table(path, str(file_kind), column) for path in group]
    return parts


def read_texts(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        yield decode(path.read_bytes(), path)


def decode(raw: bytes, path: Path, offset: int = 0) -> str:
    """Read bytes that stand at `offset` in a file, changing nothing: line ends, NUL and BOM stay.

    Raises:
        ValueError: they are not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"byte 0x{raw[error.start]:02x} at offset {offset + error.start}"
        raise ValueError(f"{path} is not UTF-8: {place} ({error.reason}). Save it as UTF-8.") from error


def read_table(path: Path, file_kind: str, column: str) -> datasets.Dataset:
    """Read the texts of a .jsonl, .json, .csv or .parquet file."""
    if file_kind != "parquet":
        offset = 0
        with path.open("rb") as file:
            for line in file:  # The loaders do not check the encoding (JSON), or do not say where it breaks (CSV).
                decode(line, path, offset)
                offset += len(line)
    pattern = glob.escape(str(path))  # `data_files` are patterns.
    options = reading_options(file_kind, column)
    return select_texts(load_table(str(path), file_kind, data_files=pattern, split="train", **options), column, path)


def reading_options(file_kind: str, column: str) -> dict[str, Any]:
    """What the loader of a kind of file must be told to leave text as it is."""
    # Without these pandas reads "NA" as missing, and "007" as the number 7.
    return {"keep_default_na": False, "converters": {column: str}} if file_kind == "csv" else {}


def load_table(name: str, *args: Any, **options: Any) -> Any:
    """`datasets.load_dataset`, a table or a stream, with one line of what went wrong."""
    limit_waiting()
    try:
        return datasets.load_dataset(*args, **options)
    except (DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{name} cannot be read: {reason}") from error


def select_texts(table: datasets.Dataset, column: str, name: Any) -> datasets.Dataset:
    """Reduce a table to its non-empty texts, as the column `text`.

    Raises:
        ValueError: there is no such column, or a row holds no text, which is refused rather than left out.
    """
    if "__index_level_0__" in table.column_names:  # pandas' name for fields in front of the first named column
        raise ValueError(f"{name}: the rows have more fields than the header. Quote texts that hold a comma.")
    check_column(table.column_names, column, name)
    table = table.select_columns(column).rename_columns({column: "text"})
    is_text = table.features["text"] in (datasets.Value("string"), datasets.Value("large_string"))
    if not is_text or table.data.column("text").null_count > 0:
        for row, value in enumerate(table["text"]):
            check_text(value, f"{name}: row {row} (the first is 0) of column {column!r}")
    if table.features != TEXT:
        table = table.cast(TEXT)
    return table.filter(is_filled, input_columns=["text"], desc="Leaving out empty documents")


def check_column(columns: list[str], column: str, name: Any) -> None:
    if column not in columns:
        raise ValueError(f"{name} has no column {column!r}, only {columns}. Set `data.text_column`.")


def check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a text, got {value!r}.")


def stream_texts(data: DataConfig, shuffle_seed: int | None) -> datasets.IterableDataset:
    """The training documents of a source, read as they come: one column `text`, empty ones left out.

    Args:
        data: names the source.
        shuffle_seed: fixes the order of the shards, another one in each epoch; None leaves them as they are. Documents
            within a shard are not shuffled.

    Raises:
        ValueError: a source that cannot be read or has no such column; while it is read, a row that holds no text.
        OSError: while it is read, the source breaks off.
    """
    name, column = str(data.source or data.files), data.text_column
    if data.source is not None:
        stream = load_table(name, data.source, data.name, split=data.split, streaming=True)
    else:
        paths = [path for path in find_files(data.files) if path.stat().st_size > 0]
        kinds = sorted({str(file_format(path)) for path in paths})
        if len(kinds) != 1:
            raise ValueError(f"`data.streaming` reads files of one kind at a time, {name} are {kinds or 'empty'}.")
        if kinds == ["text"]:
            column = "text"
            stream = datasets.IterableDataset.from_generator(text_files, features=TEXT, gen_kwargs={"paths": paths})
        else:
            patterns = [glob.escape(str(path)) for path in paths]
            options = reading_options(kinds[0], column)
            stream = load_table(name, kinds[0], data_files=patterns, split="train", streaming=True, **options)
    if stream.column_names is not None:
        check_column(stream.column_names, column, name)
    if shuffle_seed is not None:
        stream = stream.shuffle(seed=shuffle_seed, buffer_size=1)
    checked = partial(checked_text, column=column, name=name)
    stream = stream.map(checked, remove_columns=stream.column_names, features=TEXT)
    return stream.filter(is_filled, input_columns=["text"])


def text_files(paths: list[Path]) -> Iterator[dict[str, str]]:
    for text in read_texts(paths):
        yield {"text": text}


def checked_text(example: dict[str, Any], column: str, name: str) -> dict[str, str]:
    check_text(example[column], f"{name}: every row of column {column!r}")
    return {"text": example[column]}


def is_filled(text: str) -> bool:
    return text != ""


def store_texts(texts: Callable[[], Iterable[str]]) -> datasets.Dataset:
    """Write texts to a memory-mapped cache file that is found again by their content.

    Args:
        texts: gives the same texts each time it is called: once to know their content, once to store it if it is new.

    Raises:
        ValueError: the texts changed in between.
    """
    content = hashlib.sha256()
    count = sum(1 for _ in filled_texts(texts(), content))
    if count == 0:
        return datasets.Dataset.from_dict({"text": []}, features=TEXT)
    fingerprint = content.hexdigest()[:32]
    options = {"texts": texts, "fingerprint": fingerprint}
    try:
        return datasets.Dataset.from_generator(text_rows, features=TEXT, gen_kwargs=options, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        raise ValueError(f"the text cannot be stored: {error.__cause__}") from error


def text_rows(texts: Callable[[], Iterable[str]], fingerprint: str) -> Iterator[dict[str, str]]:
    content = hashlib.sha256()
    for text in filled_texts(texts(), content):
        yield {"text": text}
    if content.hexdigest()[:32] != fingerprint:
        raise ValueError("it changed while it was read. Start again when nothing writes to its files.")


def filled_texts(texts: Iterable[str], content: "hashlib._Hash") -> Iterator[str]:
    """Yield the texts that are not empty, and add each to the hash `content`."""
    for text in texts:
        if text:
            raw = text.encode("utf-8")
            content.update(len(raw).to_bytes(8, "big") + raw)
            yield text
