"""llm.c: one .bin file, a header of 256 int32 and then every tensor of all blocks together, as `nn.Linear` has them.

Version 3 is fp32, version 5 bf16; the vocabulary is padded to a multiple of 128. https://github.com/karpathy/llm.c
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hfgpt.configuration_hfgpt import HFGPTConfig
from hfgpt.modeling_hfgpt import HFGPTForCausalLM
from hfgpt.weights.tables import (
    QKV,
    Checkpoint,
    Entry,
    Step,
    expand,
    own_tensors,
    refuse_other_inner_width,
    settings_of,
    walk_out,
)

MAGIC = 20240326
DTYPES = {3: torch.float32, 5: torch.bfloat16}
HEADER_BYTES = 256 * 4
PADDED_TO = 128  # the vocabulary, for the sake of llm.c's kernels

WHOLE_MODEL = (
    Entry("wte", ("embed_tokens.weight",)),
    Entry("wpe", ("embed_positions.weight",)),
    Entry("lnfw", ("norm.weight",)),
    Entry("lnfb", ("norm.bias",)),
)

EACH_BLOCK = (
    Entry("ln1w", ("input_layernorm.weight",)),
    Entry("ln1b", ("input_layernorm.bias",)),
    Entry("qkvw", tuple(f"{name}.weight" for name in QKV)),
    Entry("qkvb", tuple(f"{name}.bias" for name in QKV)),
    Entry("attprojw", ("self_attn.o_proj.weight",)),
    Entry("attprojb", ("self_attn.o_proj.bias",)),
    Entry("ln2w", ("post_attention_layernorm.weight",)),
    Entry("ln2b", ("post_attention_layernorm.bias",)),
    Entry("fcw", ("mlp.up_proj.weight",)),
    Entry("fcb", ("mlp.up_proj.bias",)),
    Entry("fcprojw", ("mlp.down_proj.weight",)),
    Entry("fcprojb", ("mlp.down_proj.bias",)),
)


def table(num_layers: int) -> list[Entry]:
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
    """Whether a file begins as llm.c's models do."""
    with file.open("rb") as stream:
        return stream.read(4) == MAGIC.to_bytes(4, "little")


def read(file: Path) -> Checkpoint:
    """Read a model file; the tensors stay on the disk until they are used.

    Raises:
        ValueError: another kind of file, another byte order or version, or a size that its header does not imply.
    """
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size < 256:
        raise ValueError(f"{file}: {header.size * 4} bytes, shorter than llm.c's header of {HEADER_BYTES}.")
    magic, version, positions, vocab_size, layers, heads, width, padded = header[:8].tolist()
    if magic == int.from_bytes(MAGIC.to_bytes(4, "little"), "big", signed=True):
        raise ValueError(f"{file}: big-endian; llm.c writes little-endian.")
    if magic != MAGIC:
        raise ValueError(f"{file}: begins with {magic}; a model of llm.c begins with {MAGIC}.")
    if version not in DTYPES:
        raise ValueError(f"{file}: version {version}; hfgpt reads {list(DTYPES)} (fp32, bf16).")
    if min(positions, vocab_size, layers, heads, width) < 1 or padded < vocab_size:
        raise ValueError(f"{file}: the header has an impossible shape: {header[2:8].tolist()}.")

    dtype = DTYPES[version]
    shapes = shapes_in_order(width, positions, padded, layers)
    expected = HEADER_BYTES + dtype.itemsize * sum(int(np.prod(shape)) for shape in shapes.values())
    if file.stat().st_size != expected:
        raise ValueError(f"{file}: {file.stat().st_size} bytes, by its header it should have {expected}.")
    data = torch.from_file(str(file), shared=False, size=expected, dtype=torch.uint8)[HEADER_BYTES:].view(dtype)

    tensors: dict[str, Tensor] = {}
    start = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        tensor = data[start : start + size].view(shape)
        start += size
        if any(row.foreign == name for row in EACH_BLOCK):
            tensors |= {f"{layer}.{name}": tensor[layer] for layer in range(layers)}
        else:
            tensors[name] = tensor
    steps = []
    if padded > vocab_size:
        steps.append(Step("wte", (padded, width), f"cut: {padded - vocab_size} rows of padding", is_exact=False))
        tensors["wte"] = tensors["wte"][:vocab_size]
    config = HFGPTConfig(
        vocab_size=vocab_size,
        max_position_embeddings=positions,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        dtype=dtype,
    )
    return Checkpoint(tensors, config, table(layers), steps=steps)


def write(model: HFGPTForCausalLM, file: Path) -> list[Step]:
    """Write a model file: version 5 of a bf16 model, version 3 of one in fp32.

    Raises:
        ValueError: another dtype, activation or inner width than llm.c has, or an untied output layer.
    """
    config = model.config
    settings_of(model, activation_function="gelu_new", tie_word_embeddings=True)
    refuse_other_inner_width(model)
    versions = {dtype: version for version, dtype in DTYPES.items()}
    if model.dtype not in versions:
        raise ValueError(f"the format needs fp32 or bf16, the model is {model.dtype}. Give `--dtype`.")
    layers = config.num_hidden_layers
    tensors, steps = walk_out(table(layers), own_tensors(model))
    padding = -config.vocab_size % PADDED_TO
    padded = config.vocab_size + padding
    if padding:
        tensors["wte"] = F.pad(tensors["wte"], (0, 0, 0, padding))
        steps.append(Step("wte", tuple(tensors["wte"].shape), f"filled with {padding} rows of zeros", is_exact=False))
    header = np.zeros(256, dtype="<i4")
    header[:8] = (
        MAGIC,
        versions[model.dtype],
        config.max_position_embeddings,
        config.vocab_size,
        layers,
        config.num_attention_heads,
        config.hidden_size,
        padded,
    )
    with file.open("wb") as stream:
        stream.write(header.tobytes())
        for name in shapes_in_order(config.hidden_size, config.max_position_embeddings, padded, layers):
            keys = [name] if name in tensors else [f"{layer}.{name}" for layer in range(layers)]
            for key in keys:
                stream.write(tensors[key].contiguous().view(torch.uint8).numpy().tobytes())
    return steps
