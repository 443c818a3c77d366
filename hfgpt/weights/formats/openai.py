"""OpenAI's original checkpoints of GPT-2: a folder that TensorFlow wrote, read and written without TensorFlow.

`hparams.json` has the shape, `model.ckpt.index` is a sorted table (LevelDB's format) from names to places, and
`model.ckpt.data-00000-of-00001` holds the numbers. Both carry CRC-32C checksums, and all of them are checked.
https://github.com/openai/gpt-2, tensorflow/core/protobuf/tensor_bundle.proto
"""

import json
import re
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.activations import ACT2FN

from hfgpt.configuration_hfgpt import GPT2_TOKEN_IDS, HFGPTConfig
from hfgpt.weights.formats import bpe, reference_forward
from hfgpt.weights.formats.tensorflow_table import checksum, field_of, parse, repeated, sorted_table, table_entries
from hfgpt.weights.lazy_tensors import LazyTensor, in_file
from hfgpt.weights.model_parts import ModelParts, SourceModel
from hfgpt.weights.table import QKV, Change, TensorMapping, check_gpt2_like, check_num_blocks, expand, export_tensors

VOCABULARY, MERGES = "encoder.json", "vocab.bpe"
HPARAMS, LATEST = "hparams.json", "checkpoint"
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
"""As OpenAI's are called and ours; fine-tuned ones are called `model-1000.index` and the like."""

FLOAT32 = 1  # TensorFlow's number for it
PARTS = 7  # the field of a variable that is stored in several

OF_OPTIMIZERS = r"(beta[12]_power|global_step|learning_rate|loss_scale|Variable)(_\d+)?"
"""Names of variables that optimizers keep, without their scope, besides those for each of the model's."""

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


OF_MODEL = "({}|model/h[0-9]+/({}))".format(*("|".join(each.foreign for each in t) for t in (WHOLE_MODEL, EACH_BLOCK)))
"""Pattern of the names of a model's variables."""


def table(num_layers: int) -> list[TensorMapping]:
    return expand(WHOLE_MODEL, EACH_BLOCK, "model/h{layer}/", num_layers)


def recognises(folder: Path) -> bool:
    """Whether a folder is one of OpenAI's kind: with a checkpoint of TensorFlow's, and none of transformers'."""
    is_known = (folder / HPARAMS).is_file() or not (folder / "config.json").is_file()
    return folder.is_dir() and is_known and any(folder.glob("*.index"))


def latest(folder: Path) -> str:
    """The name that a checkpoint's files begin with: by the file `checkpoint`, in which TensorFlow keeps it.

    Raises:
        ValueError: that one is not there, or none is named and there are several.
    """
    there = sorted(file.stem for file in folder.glob("*.index"))
    if not (folder / LATEST).is_file():
        if len(there) > 1:
            raise ValueError(f"{folder / LATEST} is missing, and there are {', '.join(there)}: which one?")
        return there[0]
    content = (folder / LATEST).read_text(encoding="utf-8", errors="replace")
    named = re.match(r'\s*model_checkpoint_path:\s*"([^"\n]+)"', content)
    if named is None:
        raise ValueError(f"{folder / LATEST}: its first line names no `model_checkpoint_path`.")
    name = re.split(r"[/\\]", named[1])[-1]  # of a path on the machine where it was written
    if name not in there:
        raise ValueError(f"{folder / LATEST} names {name}, and there is {', '.join(there)}. Correct its first line.")
    return name


def read(folder: Path) -> SourceModel:
    """Read a checkpoint folder; the data stays on the disk until it is used.

    Raises:
        ValueError: a file is missing, damaged or does not fit the others; naming it and the tensor.
    """
    if not (folder / HPARAMS).is_file():
        raise ValueError(f"{folder / HPARAMS} is missing. Copy it from the model that was fine-tuned, `models/124M`.")
    index, file = (folder / name.replace("model.ckpt", latest(folder)) for name in (INDEX, DATA))
    if not file.is_file():
        raise ValueError(f"{file} is missing.")
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

    tensors: dict[str, LazyTensor] = {}
    dropped: list[Change] = []
    expected = 0
    for key, value in table_entries(index):
        name, place = key.decode(), parse(value)
        if not key:  # the header of the whole: the number of data files, the byte order
            if place.get(1) != 1 or place.get(2, 0) != 0:
                raise ValueError(f"{index}: big-endian, or of several data files; hfgpt reads GPT-2's kind.")
            continue
        dims = [parse(dim).get(1, 0) for dim in repeated(place.get(2, b""), 2)]
        start, length = place.get(4, 0), place.get(5, 0)
        expected += length
        if is_of_optimizer(name):
            dropped.append(Change(name, tuple(dims), "dropped: the optimizer's", is_exact=False))
            continue
        if place.get(1) != FLOAT32 or PARTS in place or place.get(3, 0) != 0:
            raise ValueError(f"{index}: {name} is in parts, or of another type than fp32, TensorFlow's 1.")
        if start + length > file.stat().st_size or length != 4 * prod(dims):
            raise ValueError(f"{file}: too short, or of another shape, for {name} {tuple(dims)}.")
        # Matrices are kernels of a convolution of width 1.
        shape = dims[1:] if name.endswith("/w") and len(dims) == 3 and dims[0] == 1 else dims
        check = matches(place.get(6), f"{file}: {name} does not match its checksum.")
        tensors[name] = in_file(file, start, tuple(shape), torch.float32, check=check)
    if file.stat().st_size != expected:
        raise ValueError(f"{file}: {file.stat().st_size} bytes, by the index it should have {expected}.")
    check_num_blocks(config, tensors)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    notes = [f"dropped {len(dropped)} variables of the optimizer, such as {dropped[0].name}."] if dropped else []
    forward = partial(logits, tensors, layers, heads)
    return SourceModel(dict(tensors), config, table(layers), forward, changes=dropped, notes=notes)


def is_of_optimizer(name: str) -> bool:
    """Whether TensorFlow's optimizers keep a variable: `beta1_power`, or `model/wte/Adam` of `model/wte`."""
    of_one, _, slot = name.rpartition("/")
    if slot == "ExponentialMovingAverage":  # other weights of the model: not to be dropped unasked
        return False
    return bool(re.search(rf"(^|/){OF_MODEL}$", of_one) or re.fullmatch(OF_OPTIMIZERS, slot))


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
    added = bpe.kept_whole(tokenizer, rows)
    if added:
        raise ValueError(f"the tokenizer keeps {added[0]!r} whole, for which OpenAI's files have no place.")
    bpe.write_files(tokenizer, rows, folder / VOCABULARY, folder / MERGES)


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
    (folder / LATEST).write_text(
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
