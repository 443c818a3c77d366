"""OpenAI's original checkpoints of GPT-2: a folder that TensorFlow wrote, read and written without TensorFlow.

`hparams.json` has the shape, `model.ckpt.index` is a sorted table (LevelDB's format) from names to places, and
`model.ckpt.data-00000-of-00001` holds the numbers. Both carry CRC-32C checksums, and all of them are checked.
https://github.com/openai/gpt-2, tensorflow/core/protobuf/tensor_bundle.proto
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.activations import ACT2FN

from hfgpt.configuration_hfgpt import GPT2_TOKEN_IDS, HFGPTConfig
from hfgpt.system.extras import needs
from hfgpt.weights.formats import bpe, reference_forward
from hfgpt.weights.lazy_tensors import LazyTensor, in_file
from hfgpt.weights.model_parts import ModelParts, SourceModel
from hfgpt.weights.table import QKV, Change, TensorMapping, check_gpt2_like, check_num_blocks, expand, export_tensors

VOCABULARY, MERGES = "encoder.json", "vocab.bpe"
HPARAMS, INDEX, DATA = "hparams.json", "model.ckpt.index", "model.ckpt.data-00000-of-00001"
TABLE_MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48
FLOAT32 = 1  # TensorFlow's number for it
PARTS = 7  # the field of a variable that is stored in several

SIZES = {
    "n_vocab": "vocab_size",
    "n_ctx": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}
"""Sizes in hparams.json -> in hfgpt's config."""

WHOLE_MODEL = (
    TensorMapping("model/wte", ("embed_tokens.weight",)),
    TensorMapping("model/wpe", ("embed_positions.weight",)),
    TensorMapping("model/ln_f/g", ("norm.weight",)),
    TensorMapping("model/ln_f/b", ("norm.bias",)),
)

EACH_BLOCK = (
    TensorMapping("ln_1/g", ("input_layernorm.weight",)),
    TensorMapping("ln_1/b", ("input_layernorm.bias",)),
    TensorMapping("attn/c_attn/w", tuple(f"{name}.weight" for name in QKV), transposed=True),
    TensorMapping("attn/c_attn/b", tuple(f"{name}.bias" for name in QKV)),
    TensorMapping("attn/c_proj/w", ("self_attn.o_proj.weight",), transposed=True),
    TensorMapping("attn/c_proj/b", ("self_attn.o_proj.bias",)),
    TensorMapping("ln_2/g", ("post_attention_layernorm.weight",)),
    TensorMapping("ln_2/b", ("post_attention_layernorm.bias",)),
    TensorMapping("mlp/c_fc/w", ("mlp.up_proj.weight",), transposed=True),
    TensorMapping("mlp/c_fc/b", ("mlp.up_proj.bias",)),
    TensorMapping("mlp/c_proj/w", ("mlp.down_proj.weight",), transposed=True),
    TensorMapping("mlp/c_proj/b", ("mlp.down_proj.bias",)),
)


def table(num_layers: int) -> list[TensorMapping]:
    return expand(WHOLE_MODEL, EACH_BLOCK, "model/h{layer}/", num_layers)


def recognises(folder: Path) -> bool:
    """Whether a folder is one of OpenAI's."""
    return (folder / HPARAMS).is_file() and (folder / INDEX).is_file()


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


def read(folder: Path) -> SourceModel:
    """Read a checkpoint folder; the data stays on the disk until it is used.

    Raises:
        ValueError: a file is missing, damaged or does not fit the others; naming it and the tensor.
    """
    for name in (INDEX, DATA):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing.")
    try:
        shape = json.loads((folder / HPARAMS).read_text(encoding="utf-8"))
        unknown = sorted(set(shape) - set(SIZES))
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}")
        config = HFGPTConfig(
            **{ours: shape[theirs] for theirs, ours in SIZES.items()},
            **{name: value for name, value in GPT2_TOKEN_IDS.items() if value < shape["n_vocab"]},
        )
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{folder / HPARAMS}: not OpenAI's shape of a GPT-2: {error!r}.") from error

    file = folder / DATA
    tensors: dict[str, LazyTensor] = {}
    for key, value in table_entries(folder / INDEX):
        name, place = key.decode(), parse(value)
        if not key:  # the header of the whole: the number of data files, the byte order
            if place.get(1) != 1 or place.get(2, 0) != 0:
                raise ValueError(f"{folder / INDEX}: big-endian, or of several data files; hfgpt reads GPT-2's kind.")
            continue
        if place.get(1) != FLOAT32 or PARTS in place or place.get(3, 0) != 0:
            raise ValueError(f"{folder / INDEX}: {name} is in parts, or of another type than fp32, TensorFlow's 1.")
        dims = [parse(dim).get(1, 0) for dim in repeated(place.get(2, b""), 2)]
        start, length = place.get(4, 0), place.get(5, 0)
        if start + length > file.stat().st_size or length != 4 * prod(dims):
            raise ValueError(f"{file}: too short, or of another shape, for {name} {tuple(dims)}.")
        # Matrices are kernels of a convolution of width 1.
        shape = dims[1:] if name.endswith("/w") and len(dims) == 3 and dims[0] == 1 else dims
        check = matches(place.get(6), f"{file}: {name} does not match its checksum.")
        tensors[name] = in_file(file, start, tuple(shape), torch.float32, check=check)
    expected = 4 * sum(prod(each.shape) for each in tensors.values())
    if file.stat().st_size != expected:
        raise ValueError(f"{file}: {file.stat().st_size} bytes, by the index it should have {expected}.")
    check_num_blocks(config, tensors)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    return SourceModel(dict(tensors), config, table(layers), partial(logits, tensors, layers, heads))


def matches(stored: int | None, fault: str) -> Callable[[np.ndarray], None]:
    """A function that compares bytes with their checksum, and raises a ValueError that says `fault`."""

    def check(content: np.ndarray) -> None:
        if checksum(content.data) != stored:
            raise ValueError(fault)

    return check


def logits(tensors: dict[str, LazyTensor], layers: int, heads: int, ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """The own forward pass of OpenAI's model.py: (B, T) to (B, T, V)."""
    weight = reference_forward.reader(tensors, dtype)

    def norm(x: Tensor, name: str) -> Tensor:
        return reference_forward.norm(x, weight(f"{name}/g"), weight(f"{name}/b"))

    def conv1d(x: Tensor, name: str) -> Tensor:
        return x @ weight(f"{name}/w") + weight(f"{name}/b")

    wte = weight("model/wte")
    x = wte[ids_BT] + weight("model/wpe")[: ids_BT.shape[1]]
    for block in (f"model/h{layer}" for layer in range(layers)):
        q, k, v = conv1d(norm(x, f"{block}/ln_1"), f"{block}/attn/c_attn").chunk(3, dim=-1)
        x = x + conv1d(reference_forward.attend(q, k, v, heads), f"{block}/attn/c_proj")
        inner = ACT2FN["gelu_new"](conv1d(norm(x, f"{block}/ln_2"), f"{block}/mlp/c_fc"))
        x = x + conv1d(inner, f"{block}/mlp/c_proj")
    return norm(x, "model/ln_f") @ wte.T


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The byte-level BPE of `encoder.json` and `vocab.bpe`, or None if they are not there."""
    vocabulary, merges = folder / VOCABULARY, folder / MERGES
    if not (vocabulary.is_file() and merges.is_file()):
        return None
    return bpe.join_model(vocabulary, merges, json.loads((folder / HPARAMS).read_text(encoding="utf-8"))["n_ctx"])


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, rows: int) -> None:
    """Write the two files that OpenAI's encoder.py reads; tokens beyond the model's `rows` are left out.

    Raises:
        ValueError: the tokenizer is not of their kind.
    """
    vocabulary, merges = bpe.split_model(tokenizer)
    there = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items() if token_id < rows}
    added = [token for token in there.values() if token != bpe.END_OF_TEXT]
    if added:
        raise ValueError(f"the tokenizer keeps {added[0]!r} whole, for which OpenAI's files have no place.")
    in_order = {token: at for token, at in sorted(vocabulary.items(), key=lambda item: item[1]) if at < rows}
    (folder / VOCABULARY).write_text(json.dumps(in_order), encoding="utf-8")
    lines = ["#version: 0.2", *merges, ""]  # encoder.py leaves the first and the last out
    (folder / MERGES).write_bytes("\n".join(lines).encode())


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


def write(parts: ModelParts, folder: Path) -> list[Change]:
    """Write a checkpoint folder that TensorFlow and OpenAI's code read.

    Raises:
        ValueError: another activation, inner width or dtype than OpenAI's, or an untied output layer.
    """
    config = parts.config
    check_gpt2_like(config, activation_function="gelu_new", tie_word_embeddings=True)
    if parts.dtype != torch.float32:
        raise ValueError(f"the format needs fp32, the model is {parts.dtype}. Give `--dtype fp32`.")
    tensors, changes = export_tensors(table(config.num_hidden_layers), parts.tensors)
    folder.mkdir()
    hparams = {theirs: getattr(config, ours) for theirs, ours in SIZES.items()}
    (folder / HPARAMS).write_text(json.dumps(hparams), encoding="utf-8")
    (folder / "checkpoint").write_text(
        'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n', encoding="utf-8"
    )
    header = field_of(1, 1) + field_of(3, field_of(1, 1))  # one file of data, little-endian, version 1
    entries = [(b"", header)]
    start = 0
    with (folder / DATA).open("wb") as stream:
        for name in sorted(tensors, key=str.encode):
            tensor = tensors[name][None] if name.endswith("/w") else tensors[name]
            content = tensor.contiguous().numpy().astype("<f4", copy=False).reshape(-1).view(np.uint8).data
            stream.write(content)
            shape = b"".join(field_of(2, field_of(1, size)) for size in tensor.shape)
            place = field_of(1, FLOAT32) + field_of(2, shape) + (field_of(4, start) if start else b"")
            place += field_of(5, len(content)) + bytes([6 << 3 | 5]) + checksum(content).to_bytes(4, "little")
            entries.append((name.encode(), place))
            start += len(content)
    (folder / INDEX).write_bytes(sorted_table(entries))
    return changes


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
