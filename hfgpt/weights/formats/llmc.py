"""llm.c: one .bin file, a header of 256 int32 and then every tensor of all blocks together, as `nn.Linear` has them.

Version 3 is fp32, version 5 bf16; the vocabulary is padded to a multiple of 128. Beside it llm.c may keep a debug
state: the logits, the loss and the gradients of one batch. https://github.com/karpathy/llm.c
"""

from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from hfgpt.configuration_hfgpt import HFGPTConfig
from hfgpt.modeling_hfgpt import HFGPTForCausalLM
from hfgpt.weights.formats import reference_forward
from hfgpt.weights.lazy_tensors import LazyTensor, in_file
from hfgpt.weights.model_parts import ModelParts, SourceModel, empty_model
from hfgpt.weights.table import QKV, Change, TensorMapping, check_gpt2_like, expand, export_tensors, import_tensors

MAGIC = 20240326
DEBUG_MAGIC, DEBUG_VERSION = 20240327, 2
DTYPES = {3: torch.float32, 5: torch.bfloat16}
HEADER_BYTES = 256 * 4
SIZES = ("max_position_embeddings", "vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size")
"""The sizes of the model in the header's order, after the magic number and the version."""

PADDED_TO = 128  # the vocabulary, for the sake of llm.c's kernels

WHOLE_MODEL = (
    TensorMapping("wte", ("embed_tokens.weight",)),
    TensorMapping("wpe", ("embed_positions.weight",)),
    TensorMapping("lnfw", ("norm.weight",)),
    TensorMapping("lnfb", ("norm.bias",)),
)

EACH_BLOCK = (
    TensorMapping("ln1w", ("input_layernorm.weight",)),
    TensorMapping("ln1b", ("input_layernorm.bias",)),
    TensorMapping("qkvw", tuple(f"{name}.weight" for name in QKV)),
    TensorMapping("qkvb", tuple(f"{name}.bias" for name in QKV)),
    TensorMapping("attprojw", ("self_attn.o_proj.weight",)),
    TensorMapping("attprojb", ("self_attn.o_proj.bias",)),
    TensorMapping("ln2w", ("post_attention_layernorm.weight",)),
    TensorMapping("ln2b", ("post_attention_layernorm.bias",)),
    TensorMapping("fcw", ("mlp.up_proj.weight",)),
    TensorMapping("fcb", ("mlp.up_proj.bias",)),
    TensorMapping("fcprojw", ("mlp.down_proj.weight",)),
    TensorMapping("fcprojb", ("mlp.down_proj.bias",)),
)


def table(num_layers: int) -> list[TensorMapping]:
    return expand(WHOLE_MODEL, EACH_BLOCK, "{layer}.", num_layers)


def shapes_in_order(width: int, positions: int, padded_vocab_size: int, layers: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor as it lies in the file, in the file's order; those of blocks have the block first."""
    inner, C, L = 4 * width, width, layers
    return {
        "wte": (padded_vocab_size, C),
        "wpe": (positions, C),
        "ln1w": (L, C),
        "ln1b": (L, C),
        "qkvw": (L, 3 * C, C),
        "qkvb": (L, 3 * C),
        "attprojw": (L, C, C),
        "attprojb": (L, C),
        "ln2w": (L, C),
        "ln2b": (L, C),
        "fcw": (L, inner, C),
        "fcb": (L, inner),
        "fcprojw": (L, C, inner),
        "fcprojb": (L, C),
        "lnfw": (C,),
        "lnfb": (C,),
    }


def recognises(file: Path) -> bool:
    """Whether a file begins as a model does, in either byte order, whatever it is called."""
    with file.open("rb") as stream:
        return stream.read(4) in (MAGIC.to_bytes(4, "little"), MAGIC.to_bytes(4, "big"))


def read(file: Path) -> SourceModel:
    """Read a model file; the tensors stay on the disk until they are used.

    Raises:
        ValueError: another kind of file, another byte order or version, or a size that its header does not imply.
    """
    _, version, *numbers, padded = header_of(file, MAGIC, "a model")[:8]
    positions, vocab_size, layers, heads, width = numbers
    if version not in DTYPES:
        raise ValueError(f"{file}: version {version}; hfgpt reads {list(DTYPES)} (fp32, bf16).")
    if min(numbers) < 1 or padded < vocab_size:
        raise ValueError(f"{file}: the header has an impossible shape: {[*numbers, padded]}.")
    dtype = DTYPES[version]
    shapes = shapes_in_order(width, positions, padded, layers)
    tensors = places(file, HEADER_BYTES, shapes, dtype)
    changes = []
    if padded > vocab_size:
        end = HEADER_BYTES + vocab_size * width * dtype.itemsize
        padding = in_file(file, end, (padded - vocab_size, width), dtype)
        if padding.read().any():
            raise ValueError(f"{file}: `vocab_size` is {vocab_size}, and wte has numbers after so many rows.")
        changes.append(Change("wte", (padded, width), f"cut: {padded - vocab_size} rows of padding", is_exact=False))
        tensors["wte"] = in_file(file, HEADER_BYTES, (vocab_size, width), dtype)
    config = HFGPTConfig(**dict(zip(SIZES, numbers, strict=True)), dtype=dtype)
    return SourceModel(dict(tensors), config, table(layers), partial(logits, tensors, layers, heads), changes=changes)


def header_of(file: Path, magic: int, what: str) -> list[int]:
    """The 256 numbers that a file begins with.

    Raises:
        ValueError: another kind of file, or another byte order.
    """
    header = np.fromfile(file, dtype="<i4", count=256).tolist()
    if len(header) < 256:
        raise ValueError(f"{file}: {len(header) * 4} bytes, shorter than llm.c's header of {HEADER_BYTES}.")
    if header[0] == int.from_bytes(magic.to_bytes(4, "little"), "big", signed=True):
        raise ValueError(f"{file}: big-endian; llm.c writes little-endian.")
    if header[0] != magic:
        raise ValueError(f"{file}: begins with {header[0]}; {what} of llm.c begins with {magic}.")
    return header


def places(file: Path, start: int, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, LazyTensor]:
    """Where every tensor lies from byte `start` to the end of the file, those of blocks one by one.

    Raises:
        ValueError: the file is shorter or longer than that.
    """
    size = file.stat().st_size
    expected = start + dtype.itemsize * sum(map(prod, shapes.values()))
    if size != expected:  # first of all: a header may speak of billions of blocks
        raise ValueError(f"{file}: {size} bytes, by its header it should have {expected}.")
    in_blocks = {mapping.foreign for mapping in EACH_BLOCK}
    tensors: dict[str, LazyTensor] = {}
    for name, shape in shapes.items():
        parts = [(f"{layer}.{name}", shape[1:]) for layer in range(shape[0])] if name in in_blocks else [(name, shape)]
        for key, part in parts:
            tensors[key] = in_file(file, start, part, dtype)
            start += prod(part) * dtype.itemsize
    return tensors


def logits(tensors: dict[str, LazyTensor], layers: int, heads: int, ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """The own forward pass of llm.c: (B, T) to (B, T, V)."""
    weight = reference_forward.reader(tensors, dtype)

    def norm(x: Tensor, name: str) -> Tensor:
        return reference_forward.norm(x, weight(f"{name}w"), weight(f"{name}b"))

    def matmul(x: Tensor, name: str) -> Tensor:
        return x @ weight(f"{name}w").T + weight(f"{name}b")

    wte = weight("wte")
    x = wte[ids_BT] + weight("wpe")[: ids_BT.shape[1]]
    for layer in range(layers):
        q, k, v = matmul(norm(x, f"{layer}.ln1"), f"{layer}.qkv").chunk(3, dim=-1)
        x = x + matmul(reference_forward.attend(q, k, v, heads), f"{layer}.attproj")
        x = x + matmul(ACT2FN["gelu_new"](matmul(norm(x, f"{layer}.ln2"), f"{layer}.fc")), f"{layer}.fcproj")
    return norm(x, "lnf") @ wte.T


def write(parts: ModelParts, file: Path) -> list[Change]:
    """Write a model file: version 5 of a bf16 model, version 3 of one in fp32.

    Raises:
        ValueError: another dtype, activation or inner width than llm.c has, or an untied output layer.
    """
    check_gpt2_like(parts.config, activation_function="gelu_new", tie_word_embeddings=True)
    versions = {dtype: version for version, dtype in DTYPES.items()}
    if parts.dtype not in versions:
        raise ValueError(f"the format needs fp32 or bf16, the model is {parts.dtype}. Give `--dtype`.")
    config, version = parts.config, versions[parts.dtype]
    layers, padding = config.num_hidden_layers, -config.vocab_size % PADDED_TO
    tensors, changes = export_tensors(table(layers), parts.tensors)
    if padding:
        shape = (config.vocab_size + padding, config.hidden_size)
        changes.append(Change("wte", shape, f"filled with {padding} rows of zeros", is_exact=False))
    header = [MAGIC, version, *(getattr(config, name) for name in SIZES), config.vocab_size + padding]
    with file.open("wb") as stream:
        stream.write(np.array(header, dtype="<i4").tobytes().ljust(HEADER_BYTES, b"\0"))
        for name in shapes_in_order(config.hidden_size, config.max_position_embeddings, config.vocab_size, layers):
            for key in [name] if name in tensors else [f"{layer}.{name}" for layer in range(layers)]:
                tensor = tensors[key].contiguous()
                stream.write(tensor.view(torch.uint8).numpy().data)
                if name == "wte":
                    stream.write(bytes(padding * config.hidden_size * tensor.dtype.itemsize))
    return changes


@dataclass(frozen=True)
class DebugState:
    """What a model makes of one batch, in fp32: the file that llm.c tests itself with.

    Attributes:
        ids: (B, T) int32.
        targets: (B, T) int32, the token after each, not shifted once more.
        logits: (B, T, V).
        loss: mean cross-entropy over all B T targets, in nats.
        gradients: of the loss, by hfgpt's names.
    """

    ids: Tensor
    targets: Tensor
    logits: Tensor
    loss: float
    gradients: dict[str, Tensor]


def debug_state_beside(file: Path) -> Path:
    """Where llm.c keeps the debug state of a model file, of the bf16 one beside that of the fp32 one."""
    return file.with_name(f"{file.stem.removesuffix('_bf16')}_debug_state.bin")


def make_debug_state(model: HFGPTForCausalLM, ids_BT: Tensor, targets_BT: Tensor) -> DebugState:
    """Run a model, forwards and backwards, in eval mode and fp32; its own gradients are left as they are."""
    with torch.enable_grad():
        logits_BTV = model.eval()(ids_BT.long()).logits.float()
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten().long())
        found = torch.autograd.grad(loss, list(model.parameters()))
    gradients = {name: each.float() for (name, _), each in zip(model.named_parameters(), found, strict=True)}
    return DebugState(ids_BT.int(), targets_BT.int(), logits_BTV.detach(), float(loss.detach()), gradients)


def read_debug_state(file: Path, config: HFGPTConfig) -> DebugState:
    """Read what llm.c has written for a model of this shape.

    Raises:
        ValueError: another kind of file, version or size.
    """
    _, version, batch, length = header_of(file, DEBUG_MAGIC, "a debug state")[:4]
    if version != DEBUG_VERSION:
        raise ValueError(f"{file}: version {version}; hfgpt reads {DEBUG_VERSION}.")
    if batch < 1 or length < 1:
        raise ValueError(f"{file}: a batch of {batch} texts of {length} tokens.")
    shape, vocab_size, layers = (batch, length), config.vocab_size, config.num_hidden_layers
    start = HEADER_BYTES
    batches = []
    for part, dtype in ((shape, torch.int32), (shape, torch.int32), ((*shape, vocab_size), torch.float32)):
        batches.append(in_file(file, start, part, dtype))
        start += prod(part) * dtype.itemsize
    loss = in_file(file, start, (), torch.float32)
    padded = vocab_size + -vocab_size % PADDED_TO
    shapes = shapes_in_order(config.hidden_size, config.max_position_embeddings, padded, layers)
    gradients = places(file, start + 4, shapes, torch.float32)
    gradients["wte"] = in_file(file, start + 4, (vocab_size, config.hidden_size), torch.float32)
    shapes_here = {name: tuple(each.shape) for name, each in empty_model(config).state_dict().items()}
    named, _ = import_tensors(table(layers), gradients, shapes_here)
    ids, targets, expected = (each.read() for each in batches)
    return DebugState(ids, targets, expected, float(loss.read()), named)
