"""The texts of a file, one after another: here alone it is decided what a row's text is, and what is refused.

Stored and streamed reading go through `read_texts`, whatever the format and wherever the file lies.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.utils.file_utils import xopen

from hfgpt.data.encodings import decode
from hfgpt.system.quoting import quote

ROWS_AT_ONCE = 1000
COMPRESSIONS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: io.BufferedReader(pa.CompressedInputStream(file, "zstd")),
}


@dataclass(frozen=True)
class TextFile:
    """A file of a corpus."""

    name: str
    """What messages call it."""
    path: str
    """Where it is: on this machine, or an address that `datasets` opens (`hf://...`)."""
    kind: str
    """A key of `READERS`."""

    @property
    def is_remote(self) -> bool:
        return "://" in self.path

    @property
    def is_compressed(self) -> bool:
        return self.name.lower().endswith(tuple(COMPRESSIONS))

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Open it as bytes, unpacked."""
        with ExitStack() as stack:
            file = stack.enter_context(xopen(self.path, "rb") if self.is_remote else open(self.path, "rb"))
            if self.is_compressed:
                file = stack.enter_context(COMPRESSIONS[self.name.lower()[self.name.rindex(".") :]](file))
            yield file


def read_texts(file: TextFile, column: str) -> Iterator[str]:
    """Yield the texts of a file that are not empty, in their order.

    Args:
        file: of any kind.
        column: where a row's text is; plain text has no columns.

    Raises:
        ValueError: the file is damaged, has no such column, or holds anything but text in it.
        OSError: the machine or the Hub does not give it.
    """
    try:
        with file.open() as opened:
            for row, value in enumerate(READERS[file.kind](opened, file.name, column)):
                text = as_text(value, f"{file.name}: row {row} (the first is 0) of column {column!r}")
                if text:
                    yield text
    except (pa.ArrowException, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        reason = " ".join(str(error).split())
        is_fault = isinstance(error, OSError) and (file.is_remote or error.errno is not None)
        raise (OSError if is_fault else ValueError)(f"{file.name} cannot be read: {reason}") from error


def as_text(value: Any, where: str) -> str:
    """Take a value as it is: a text, or its bytes in UTF-8.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, bytes):
        return decode(value, where)
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a text, got {quote(value)}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell one: "\ud800"
        raise ValueError(f"{where} holds half of a character, {value[error.start]!r}, which no text can.") from error
    return value


def check_column(columns: list[str], column: str, where: str) -> None:
    """Refuse a table that has not exactly one such column."""
    if column not in columns:
        raise ValueError(f"{where} has no column {column!r}, only {columns}. Set `data.text_column` (`--text-column`).")
    if columns.count(column) > 1:
        raise ValueError(f"{where} has {columns.count(column)} columns {column!r}. Give the text's a name of its own.")


def read_document(file: BinaryIO, name: str, column: str) -> Iterator[str]:
    """A file of plain text is one document."""
    yield decode(file.read(), name)


def read_lines(file: BinaryIO, name: str, column: str) -> Iterator[str]:
    """Each line of a plain text is a document, as in data sets on the Hub."""
    for line in decode_lines(file, name):
        yield line.removesuffix("\n").removesuffix("\r")


def decode_lines(file: BinaryIO, name: str) -> Iterator[str]:
    """The lines of a file, each with its line feed, without a BOM in front."""
    offset = 0
    for line in file:
        text = decode(line, name, offset)
        yield text if offset else text.removeprefix("\ufeff")
        offset += len(line)


def read_json(file: BinaryIO, name: str, column: str) -> Iterator[Any]:
    """Lines of objects, one list of objects or of texts, or one object; other keys than the column's may hold anything.

    The file says which of them it is, not its name.
    """
    lines = (line for line in decode_lines(file, name) if not line.isspace())
    first = next(lines, None)
    if first is None:
        return
    rows: Iterable[Any]
    if first.lstrip().startswith("["):
        rows = parse_json(first + "".join(lines), name)
        if all(isinstance(row, str) for row in rows):
            yield from rows
            return
    elif is_json(first):
        rows = (parse_json(line, name, row) for row, line in enumerate(chain([first], lines)))
    else:
        rows = [parse_json(first + "".join(lines), name)]
    for row, value in enumerate(rows):
        where = f"{name}: row {row} (the first is 0)"
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object with {column!r} in it, got {quote(value)}.")
        check_column(list(value), column, where if row else name)
        yield value[column]


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def parse_json(text: str, name: str, row: int = 0) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: row {row} (the first is 0) is no JSON: {error}.") from error


def read_csv(file: BinaryIO, name: str, column: str, delimiter: str) -> Iterator[str]:
    """Every field as it is written: `NA` and `007` are texts."""
    csv.field_size_limit(2**31 - 1)
    # A lone \r ends a line too, as old spreadsheets write it.
    lines = (part for line in decode_lines(file, name) for part in re.split(r"(?<=\r)(?!\n)", line) if part)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        filled = (fields for fields in rows if fields)
        header = next(filled, None)
        if header is None:
            return
        check_column(header, column, name)
        index = header.index(column)
        for row, fields in enumerate(filled):
            if len(fields) != len(header):
                raise ValueError(
                    f"{name}: row {row} (the first is 0) has {len(fields)} field(s), the header {len(header)}. "
                    f"Quote texts that hold a {delimiter!r} or a line end."
                )
            yield fields[index]
    except csv.Error as error:
        raise ValueError(f"{name} cannot be read: {error}, in line {rows.line_num}.") from error


def read_parquet(file: BinaryIO, name: str, column: str) -> Iterator[Any]:
    """One column; the others, and what the file's writer noted about them, are not looked at."""
    table = pq.ParquetFile(file)
    check_column(table.schema_arrow.names, column, name)
    for batch in table.iter_batches(ROWS_AT_ONCE, columns=[column]):
        yield from column_values(batch.column(column))


def read_arrow(file: BinaryIO, name: str, column: str) -> Iterator[Any]:
    """One column of a file as `save_to_disk` writes it, or of a Feather file."""
    try:
        batches: Any = pa.ipc.open_stream(file)
        schema = batches.schema
    except pa.ArrowInvalid:
        file.seek(0)
        reader = pa.ipc.open_file(file)
        schema, batches = reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
    check_column(schema.names, column, name)
    for batch in batches:
        yield from column_values(batch.column(column))


def column_values(array: Any) -> list[Any]:
    """The values of an Arrow column: of one that holds text in whatever way, its bytes, which nobody has checked."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    is_text = any(
        check(array.type) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )
    return list((array.cast(pa.large_binary()) if is_text else array).to_pylist())


READERS: dict[str, Callable[[Any, str, str], Iterator[Any]]] = {
    "text": read_document,
    "lines": read_lines,
    "json": read_json,
    "csv": partial(read_csv, delimiter=","),
    "tsv": partial(read_csv, delimiter="\t"),
    "parquet": read_parquet,
    "arrow": read_arrow,
}
