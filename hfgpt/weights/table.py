"""Tables of tensor names, by which every format is imported into hfgpt and exported from it.

What was done to each tensor comes back as a list of changes, so that nothing is filled, cut or dropped unseen.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hfgpt.configuration_hfgpt import HFGPTConfig
from hfgpt.system.machine import DTYPES
from hfgpt.weights.formats.reference_forward import EPSILON
from hfgpt.weights.lazy_tensors import LazyTensor, read

NONE = r"(?!)"
"""A pattern that no name matches."""

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

WEIGHT_DTYPES = {"fp64": torch.float64, **DTYPES}
"""What weights are stored as; whatever else floats, such as fp8, means something only with scales beside it."""

MASKS = (".attn.bias", ".att.mask")
"""How names of causal masks end, which older files keep as buffers; the dot spares `c_attn.bias`."""

GPT2_HEADS = {768: 12, 1024: 16, 1280: 20, 1600: 25}
"""Width -> attention heads, of the four sizes of GPT-2."""

SAME_AS = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new"}
"""Activations that are another one, computed another way."""


@dataclass(frozen=True)
class TensorMapping:
    """One tensor of a format and what it is in hfgpt.

    Attributes:
        foreign: its name in the format; in the table of one block, its name within the block.
        hfgpt: names of the tensors that it is split into along the output axis; usually one.
        transposed: whether the two layouts are each other's transpose.
        is_optional: whether the format may do without it, which then means zeros: a bias.
    """

    foreign: str
    hfgpt: tuple[str, ...]
    transposed: bool = False
    is_optional: bool = False


@dataclass(frozen=True)
class Change:
    """What was done to one tensor.

    Attributes:
        name: of the tensor in the format.
        shape: of it there; of what was filled in, in hfgpt.
        action: "copied", "transposed", "split", "joined", "filled with zeros", "cut", "dropped", or several of these.
        is_exact: whether nothing was filled, cut or dropped.
    """

    name: str
    shape: tuple[int, ...]
    action: str
    is_exact: bool = True


def expand(
    whole: Sequence[TensorMapping], each_block: Sequence[TensorMapping], block: str, num_layers: int
) -> list[TensorMapping]:
    """Write a table out for a whole model.

    Args:
        whole: entries outside of the blocks; their hfgpt names lack the `model.` prefix.
        each_block: entries within a block.
        block: prefix of a block in the format, with `{layer}` in the number's place.
        num_layers: number of blocks.
    """
    mappings = [with_prefixes(mapping, "", "model.") for mapping in whole]
    for layer in range(num_layers):
        prefixes = block.format(layer=layer), f"model.layers.{layer}."
        mappings += [with_prefixes(mapping, *prefixes) for mapping in each_block]
    return mappings


def with_prefixes(mapping: TensorMapping, foreign: str, hfgpt: str) -> TensorMapping:
    return replace(mapping, foreign=foreign + mapping.foreign, hfgpt=tuple(hfgpt + name for name in mapping.hfgpt))


def actions(mapping: TensorMapping, for_several: str) -> str:
    """What a mapping does to a tensor, in words."""
    done = (["transposed"] if mapping.transposed else []) + ([for_several] if len(mapping.hfgpt) > 1 else [])
    return ", ".join(done) or "copied"


def import_tensors(
    table: Sequence[TensorMapping],
    tensors: Mapping[str, LazyTensor | Tensor],
    shapes: dict[str, tuple[int, ...]],
    dropped: str = NONE,
) -> tuple[dict[str, Tensor], list[Change]]:
    """Make hfgpt's tensors from a format's.

    Args:
        table: of the format.
        tensors: by their names in the format.
        shapes: the shape of every tensor of the hfgpt model, by name.
        dropped: pattern of names that hfgpt has no use for.

    Returns:
        hfgpt's tensors by name, and what was done to each of the format's.

    Raises:
        ValueError: a tensor is missing, left over or of another shape than the config says.
    """
    result: dict[str, Tensor] = {}
    changes: list[Change] = []
    left_over = set(tensors) - {mapping.foreign for mapping in table}
    for name in sorted(left_over):
        if not re.search(dropped, name):
            raise ValueError(f"{name}: left over; hfgpt has no such tensor.")
        if name.endswith(MASKS):
            check_causal_mask(name, read(tensors[name]))
    filled: list[TensorMapping] = []
    for mapping in table:
        if mapping.foreign not in tensors:
            if not mapping.is_optional:
                raise ValueError(f"{mapping.foreign}: not in the file.")
            filled.append(mapping)
            continue
        lazy = tensors[mapping.foreign]
        wanted = shape_there(mapping, shapes)
        if tuple(lazy.shape) != wanted:
            raise ValueError(f"{mapping.foreign}: expected shape {wanted}, got {tuple(lazy.shape)}.")
        if lazy.dtype not in WEIGHT_DTYPES.values():
            raise ValueError(f"{mapping.foreign}: holds {lazy.dtype}, and weights are {', '.join(WEIGHT_DTYPES)}.")
        tensor = read(lazy)
        if not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"{mapping.foreign}: holds NaN or infinity.")
        parts = (tensor.T if mapping.transposed else tensor).chunk(len(mapping.hfgpt))
        # Parts in memory of their own, so that one can be let go before the others.
        result |= {
            name: part.clone(memory_format=torch.contiguous_format) if len(parts) > 1 else part.contiguous()
            for name, part in zip(mapping.hfgpt, parts, strict=True)
        }
        changes.append(Change(mapping.foreign, tuple(tensor.shape), actions(mapping, "split")))
    dtype = next(iter(result.values())).dtype
    for mapping in filled:
        result |= {name: torch.zeros(shapes[name], dtype=dtype) for name in mapping.hfgpt}
        changes.append(Change(mapping.foreign, shape_there(mapping, shapes), "filled with zeros", is_exact=False))
    for name in sorted(left_over):
        changes.append(Change(name, tuple(tensors[name].shape), "dropped", is_exact=False))
    return result, changes


def check_causal_mask(name: str, mask: Tensor) -> None:
    """Refuse a mask buffer that is not causal: dropped, it would be another attention.

    Args:
        name: of the buffer.
        mask: (..., T, T), with numbers other than zero either for what a position sees or for what it does not.

    Raises:
        ValueError: naming it.
    """
    size = mask.shape[-1] if mask.ndim else 0
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    found = mask.bool().reshape(-1, size, size) if mask.ndim >= 2 and mask.shape[-2] == size else None
    if found is None or len(found) != 1 or not (torch.equal(found[0], causal) or torch.equal(found[0], ~causal)):
        raise ValueError(f"{name}: no causal mask; hfgpt's attention is causal and nothing else.")


def shape_there(mapping: TensorMapping, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that a tensor has in the format, by those it has in hfgpt."""
    parts = [shapes[name] for name in mapping.hfgpt]
    joined = (sum(shape[0] for shape in parts), *parts[0][1:])
    return joined[::-1] if mapping.transposed else joined


def export_tensors(
    table: Sequence[TensorMapping], tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[Change]]:
    """Make a format's tensors from hfgpt's; they are copies.

    Args:
        table: of the format.
        tensors: hfgpt's. They are taken out of the dictionary as they are copied: where nothing else holds them, no
            more than one of them is in memory twice.

    Raises:
        ValueError: a tensor of hfgpt's is missing in the table, or one of the table's in hfgpt.
    """
    named = {name for mapping in table for name in mapping.hfgpt}
    if set(tensors) - named:
        raise ValueError(f"{min(set(tensors) - named)}: the format has no place for it.")
    if named - set(tensors):
        raise ValueError(f"{min(named - set(tensors))}: not in the model.")
    result, changes = {}, []
    for mapping in table:
        joined = torch.cat([tensors.pop(name) for name in mapping.hfgpt])  # of one tensor, a copy of it
        result[mapping.foreign] = joined.T.contiguous() if mapping.transposed else joined
        changes.append(Change(mapping.foreign, tuple(result[mapping.foreign].shape), actions(mapping, "joined")))
    return result, changes


def leave_out_zero_biases(
    table: Sequence[TensorMapping], tensors: dict[str, Tensor], changes: list[Change]
) -> tuple[bool, list[Change]]:
    """Take the optional biases out of `tensors` if all of them are zero, as they come from a file without them.

    Args:
        table: of the format.
        tensors: the format's.
        changes: what was done to each of them.

    Returns:
        Whether the biases are still there, and what was done to each tensor with that.
    """
    optional = {mapping.foreign for mapping in table if mapping.is_optional}
    if any(bool(tensors[name].any()) for name in optional):
        return True, changes
    for name in optional:
        del tensors[name]
    return False, [
        replace(change, action="left out: all zero, and optional") if change.name in optional else change
        for change in changes
    ]


def drop_tied_head(tensors: dict[str, LazyTensor | Tensor], head: str, embedding: str) -> tuple[bool, list[Change]]:
    """Take the output layer out of `tensors` if it is the token embedding once more.

    Returns:
        Whether the two are tied, and what was done.
    """
    if head not in tensors:
        return True, []
    ours, theirs = tensors[head], tensors.get(embedding)
    if theirs is None or ours.dtype != theirs.dtype or not torch.equal(read(ours), read(theirs)):
        return False, []
    return True, [Change(head, tuple(tensors.pop(head).shape), f"dropped: equal to {embedding}")]


def check_num_blocks(config: HFGPTConfig, tensors: Mapping[str, Any]) -> None:
    """Refuse a config with more blocks than there are tensors, before a table of them fills the memory.

    Raises:
        ValueError: naming both numbers.
    """
    if config.num_hidden_layers > len(tensors):
        raise ValueError(f"`n_layer` is {config.num_hidden_layers}, and there are {len(tensors)} tensors in all.")


def heads_of(width: int, heads: int | None) -> tuple[int, list[str]]:
    """The number of attention heads of a format that does not say it, with the guess that it rests on, if it does.

    Raises:
        ValueError: the width is none of GPT-2's, of which the number of heads would be known.
    """
    if heads is not None:
        return heads, []
    if width not in GPT2_HEADS:
        raise ValueError(
            f"the file does not say how many heads share its width of {width}. Give `--heads` to `hfgpt convert`, or "
            "`heads` to `hfgpt.weights.load`."
        )
    number = GPT2_HEADS[width]
    return number, [f"{number} heads, GPT-2's at this width: the file does not say. Else give `--heads`."]


def read_sizes(
    tensors: Mapping[str, LazyTensor | Tensor], embedding: str, positions: str, in_each_block: str
) -> dict[str, int]:
    """The sizes that the tensors of a format imply, by the names of the config's fields.

    Args:
        tensors: by their names in the format.
        embedding: name of the token embedding.
        positions: name of the position embedding.
        in_each_block: how the name of one tensor of each block ends.

    Raises:
        ValueError: an embedding is missing, or is no matrix.
    """
    vocab_size, width = shape_of(tensors, embedding)
    return {
        "vocab_size": vocab_size,
        "max_position_embeddings": shape_of(tensors, positions)[0],
        "hidden_size": width,
        "num_hidden_layers": sum(name.endswith(in_each_block) for name in tensors),
    }


def shape_of(tensors: Mapping[str, LazyTensor | Tensor], name: str) -> tuple[int, int]:
    """The shape of a matrix that must be there.

    Raises:
        ValueError: it is not, or is no matrix.
    """
    if name not in tensors:
        raise ValueError(f"{name}: not in the file.")
    shape = tuple(tensors[name].shape)
    if len(shape) != 2:
        raise ValueError(f"{name}: expected a matrix, got the shape {shape}.")
    return shape


def check_config_supported(config: HFGPTConfig, **needed: Any) -> None:
    """Refuse a model that a format cannot express.

    Raises:
        ValueError: a field of the config is not what the format needs, naming both.
    """
    for name, value in needed.items():
        has = getattr(config, name)
        if has != value and SAME_AS.get(has) != value:
            hint = " Take it with `--nearest`." if {SAME_AS.get(has, has), value} == {"gelu", "gelu_new"} else ""
            raise ValueError(f"the format needs `{name}` = {value!r}, the model has {has!r}.{hint}")


def check_gpt2_like(config: HFGPTConfig, **needed: Any) -> None:
    """Refuse what no format of a GPT-2 has a field for: another epsilon, or an MLP not four times as wide as the model.

    Args:
        config: of the model.
        **needed: what else the format needs, as for `check_config_supported`.

    Raises:
        ValueError: naming the field, its value and the one needed.
    """
    check_config_supported(config, **needed, layer_norm_epsilon=EPSILON)
    width = 4 * config.hidden_size
    if config.intermediate_size not in (None, width):
        raise ValueError(f"the format needs `intermediate_size` = {width}, the model has {config.intermediate_size}.")
