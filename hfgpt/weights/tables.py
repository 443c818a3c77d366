"""One mechanism for every format: a table of names, walked from the format to hfgpt or back.

A format is a table and a reader and writer of its bytes; see nanogpt.py for the shortest. What was done to each tensor
comes back as a list of steps, so that nothing is filled, cut or dropped unseen.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hfgpt.configuration_hfgpt import HFGPTConfig
from hfgpt.modeling_hfgpt import HFGPTForCausalLM

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Entry:
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
class Step:
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


@dataclass
class Checkpoint:
    """A checkpoint of another format, read and not yet walked.

    Attributes:
        tensors: by their names in the format.
        config: the shape, activation and tying that give the same logits in hfgpt.
        table: what each tensor is in hfgpt.
        dropped: pattern of names that hfgpt has no use for, such as causal masks.
        steps: what reading alone has done, such as a head dropped because it is the token embedding.
        notes: what a user should know of the two formats' mathematics.
    """

    tensors: dict[str, Tensor]
    config: HFGPTConfig
    table: list[Entry]
    dropped: str = r"(?!)"
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def expand(whole: Sequence[Entry], each_block: Sequence[Entry], block: str, num_layers: int) -> list[Entry]:
    """Write a table out for a whole model.

    Args:
        whole: entries outside of the blocks; their hfgpt names lack the `model.` prefix.
        each_block: entries within a block.
        block: prefix of a block in the format, with `{layer}` in the number's place.
        num_layers: number of blocks.
    """
    rows = [Entry(row.foreign, names("model.", row), row.transposed, row.is_optional) for row in whole]
    for layer in range(num_layers):
        for row in each_block:
            hfgpt = names(f"model.layers.{layer}.", row)
            rows.append(Entry(block.format(layer=layer) + row.foreign, hfgpt, row.transposed, row.is_optional))
    return rows


def names(prefix: str, row: Entry) -> tuple[str, ...]:
    return tuple(prefix + name for name in row.hfgpt)


def actions(row: Entry, for_several: str) -> str:
    """What a table row does to a tensor, in words."""
    done = (["transposed"] if row.transposed else []) + ([for_several] if len(row.hfgpt) > 1 else [])
    return ", ".join(done) or "copied"


def walk_in(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], list[Step]]:
    """Make hfgpt's tensors from a format's.

    Args:
        checkpoint: what was read.
        shapes: the shape of every tensor of the hfgpt model, by name.

    Returns:
        hfgpt's tensors by name, and what was done to each of the format's.

    Raises:
        ValueError: a tensor is missing, left over or of another shape than the config says.
    """
    result: dict[str, Tensor] = {}
    steps = list(checkpoint.steps)
    left_over = set(checkpoint.tensors)
    for row in checkpoint.table:
        tensor = checkpoint.tensors.get(row.foreign)
        left_over.discard(row.foreign)
        if tensor is None:
            if not row.is_optional:
                raise ValueError(f"{row.foreign}: not in the file.")
            result |= {name: torch.zeros(shapes[name]) for name in row.hfgpt}
            steps += [Step(row.foreign, shapes[name], "filled with zeros", is_exact=False) for name in row.hfgpt[:1]]
            continue
        outputs = [shapes[name] for name in row.hfgpt]
        wanted = (sum(shape[0] for shape in outputs), *outputs[0][1:])
        wanted = wanted[::-1] if row.transposed else wanted
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{row.foreign}: expected shape {wanted}, got {tuple(tensor.shape)}.")
        if not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"{row.foreign}: holds NaN or infinity.")
        parts = (tensor.T if row.transposed else tensor).chunk(len(row.hfgpt))
        result |= {name: part.contiguous() for name, part in zip(row.hfgpt, parts, strict=True)}
        steps.append(Step(row.foreign, tuple(tensor.shape), actions(row, "split")))
    for name in sorted(left_over):
        if not re.search(checkpoint.dropped, name):
            raise ValueError(f"{name}: left over; hfgpt has no such tensor.")
        steps.append(Step(name, tuple(checkpoint.tensors[name].shape), "dropped", is_exact=False))
    return result, steps


def walk_out(table: Sequence[Entry], tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Step]]:
    """Make a format's tensors from hfgpt's; they are copies.

    Raises:
        ValueError: a tensor of hfgpt's is missing in the table, or one of the table's in hfgpt.
    """
    left_over = set(tensors) - {name for row in table for name in row.hfgpt}
    if left_over:
        raise ValueError(f"{min(left_over)}: the format has no place for it.")
    result, steps = {}, []
    for row in table:
        missing = [name for name in row.hfgpt if name not in tensors]
        if missing:
            raise ValueError(f"{missing[0]}: not in the model.")
        joined = torch.cat([tensors[name] for name in row.hfgpt])  # of one tensor, a copy of it
        result[row.foreign] = joined.T.contiguous() if row.transposed else joined
        steps.append(Step(row.foreign, tuple(result[row.foreign].shape), actions(row, "joined")))
    return result, steps


def build(checkpoint: Checkpoint) -> tuple[HFGPTForCausalLM, list[Step]]:
    """Make the hfgpt model of a checkpoint, in eval mode, and say what was done.

    Raises:
        ValueError: the tensors do not fit.
    """
    with torch.device("meta"):
        model = HFGPTForCausalLM(checkpoint.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors, steps = walk_in(checkpoint, shapes)
    if checkpoint.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model.eval(), steps


def build_from(source: Any, checkpoint: Checkpoint) -> tuple[HFGPTForCausalLM, list[Step]]:
    """`build`, with the source named in what it refuses."""
    try:
        return build(checkpoint)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def own_tensors(model: HFGPTForCausalLM) -> dict[str, Tensor]:
    """The model's tensors, without the output layer if it is the token embedding."""
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight
    return {name: each.detach() for name, each in model.state_dict().items() if not (is_tied and "lm_head" in name)}


def drop_tied_head(tensors: dict[str, Tensor], head: str, embedding: str) -> tuple[bool, list[Step]]:
    """Take the output layer out of `tensors` if it is the token embedding once more.

    Returns:
        Whether the two are tied, and what was done.
    """
    if head not in tensors:
        return True, []
    if not torch.equal(tensors[head], tensors[embedding]):
        return False, []
    return True, [Step(head, tuple(tensors.pop(head).shape), f"dropped: equal to {embedding}")]


def heads_of(width: int, heads: int | None) -> tuple[int, list[str]]:
    """The number of attention heads of a format that does not say it, with a note on where the number is from."""
    if heads is not None:
        return heads, []
    if width % 64:
        raise ValueError(f"the file does not say how many heads share its width of {width}. Give `--heads`.")
    return width // 64, [f"{width // 64} heads of width 64, as in GPT-2: the file does not say. Else give `--heads`."]


def settings_of(model: HFGPTForCausalLM, **needed: Any) -> None:
    """Refuse a model that a format cannot express.

    Raises:
        ValueError: a field of the config is not what the format needs, naming both.
    """
    for name, value in needed.items():
        if getattr(model.config, name) != value:
            raise ValueError(f"the format needs `{name}` = {value!r}, the model has {getattr(model.config, name)!r}.")


def refuse_other_inner_width(model: HFGPTForCausalLM) -> None:
    """Refuse a model whose MLP is not four times as wide as its residual stream, where a format knows no other.

    Raises:
        ValueError: naming both widths.
    """
    needed, has = 4 * model.config.hidden_size, model.config.intermediate_size
    if has not in (None, needed):
        raise ValueError(f"the format needs `intermediate_size` = {needed}, the model has {has}.")
