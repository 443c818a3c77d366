"""TensorFlow's sorted table (LevelDB's format) and the protocol buffers in it, read and written without TensorFlow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfgpt.system.extras import needs

TABLE_MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48


def checksum(content: bytes | memoryview) -> int:
    """CRC-32C as TensorFlow stores it: rotated, plus a constant.

    Raises:
        ValueError: the library for it is not installed.
    """
    try:
        import google_crc32c
    except ImportError as error:
        raise ValueError(needs("a checkpoint of OpenAI's", "google-crc32c")) from error
    crc = google_crc32c.value(bytes(content))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def table_entries(file: Path) -> Iterator[tuple[bytes, bytes]]:
    """The entries of a sorted table, in order.

    Raises:
        ValueError: it is no such table, or damaged.
    """
    content = file.read_bytes()
    if len(content) < FOOTER_BYTES or int.from_bytes(content[-8:], "little") != TABLE_MAGIC:
        raise ValueError(f"{file}: no TensorFlow index, or cut short.")
    footer = content[-FOOTER_BYTES:]
    try:
        _, at = handle(footer, 0)
        index, _ = handle(footer, at)
        for _, value in block_entries(block(content, *index)):
            yield from block_entries(block(content, *handle(value, 0)[0]))
    except (IndexError, ValueError) as error:
        raise ValueError(f"{file}: damaged: {error}") from error


def block(content: bytes, start: int, size: int) -> bytes:
    """One block of a table, once its checksum fits."""
    stored = int.from_bytes(content[start + size + 1 : start + size + 5], "little")
    if checksum(content[start : start + size + 1]) != stored:
        raise ValueError(f"the block at byte {start} does not match its checksum.")
    if content[start + size] != 0:
        raise ValueError(f"the block at byte {start} is compressed; TensorFlow writes checkpoints uncompressed.")
    return content[start : start + size]


def block_entries(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block; each key is stored as what it shares with the one before, and the rest."""
    end = len(content) - 4 - 4 * int.from_bytes(content[-4:], "little")
    at, key = 0, b""
    while at < end:
        shared, at = varint(content, at)
        rest, at = varint(content, at)
        length, at = varint(content, at)
        key = key[:shared] + content[at : at + rest]
        yield key, content[at + rest : at + rest + length]
        at += rest + length


def handle(content: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Where a block starts and how long it is, and where the next word begins."""
    start, at = varint(content, at)
    size, at = varint(content, at)
    return (start, size), at


def varint(content: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where the next one begins.

    Raises:
        ValueError: it has no end.
    """
    value = shift = 0
    while True:
        if at >= len(content):
            raise ValueError("a number is cut short.")
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of the fields of a protocol buffer message.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(message, bytes):
        raise ValueError("a number where a message was to be expected, in the index.")
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = varint(message, at)
            yield number, value
        elif kind == 5:
            yield number, int.from_bytes(message[at : at + 4], "little")
            at += 4
        elif kind == 2:
            length, at = varint(message, at)
            yield number, message[at : at + length]
            at += length
        else:
            raise ValueError(f"a field of kind {kind} in a message of the index.")


def parse(message: bytes) -> dict[int, Any]:
    """The last value of each field."""
    return dict(fields(message))


def repeated(message: bytes, number: int) -> list[bytes]:
    """Every value of one field."""
    return [value for field, value in fields(message) if field == number and isinstance(value, bytes)]


def as_varint(value: int) -> bytes:
    result = b""
    while value >= 0x80:
        result += bytes([value & 0x7F | 0x80])
        value >>= 7
    return result + bytes([value])


def field_of(number: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer message."""
    if isinstance(value, bytes):
        return as_varint(number << 3 | 2) + as_varint(len(value)) + value
    return as_varint(number << 3) + as_varint(value)


def sorted_table(entries: list[tuple[bytes, bytes]]) -> bytes:
    """A table of one block, whose keys share nothing: as valid as TensorFlow's own, and shorter to write."""
    result = b""

    def add(pairs: list[tuple[bytes, bytes]]) -> bytes:
        nonlocal result
        content = b"".join(
            as_varint(0) + as_varint(len(key)) + as_varint(len(value)) + key + value for key, value in pairs
        )
        content += (0).to_bytes(4, "little") + (1).to_bytes(4, "little")  # one place to start reading: the beginning
        where = as_varint(len(result)) + as_varint(len(content))
        result += content + b"\0" + checksum(content + b"\0").to_bytes(4, "little")
        return where

    data = add(entries)
    meta = add([])
    index = add([(entries[-1][0], data)])
    return result + (meta + index).ljust(40, b"\0") + TABLE_MAGIC.to_bytes(8, "little")
