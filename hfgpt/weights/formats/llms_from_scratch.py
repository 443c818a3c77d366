"""LLMs-from-scratch, the code of "Build a Large Language Model (From Scratch)": `GPTModel` and `GPTModelFast`.

A state dict in a .pth or .safetensors file, by itself or as `model_state_dict`; no config beside it. The attention
layers have no biases when they were trained from scratch, and the output layer is a parameter of its own.
https://github.com/rasbt/LLMs-from-scratch
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.activations import ACT2FN

from hfgpt.configuration_hfgpt import HFGPTConfig
from hfgpt.weights.formats import reference_forward
from hfgpt.weights.lazy_tensors import LazyTensor
from hfgpt.weights.lazy_tensors import read as read_tensor
from hfgpt.weights.model_parts import ModelParts, SourceModel, Unsaid
from hfgpt.weights.table import (
    QKV,
    Change,
    TensorMapping,
    check_gpt2_like,
    drop_tied_head,
    expand,
    export_tensors,
    heads_of,
    leave_out_zero_biases,
    read_sizes,
)

EMBEDDINGS = (
    TensorMapping("tok_emb.weight", ("embed_tokens.weight",)),
    TensorMapping("pos_emb.weight", ("embed_positions.weight",)),
)

MLP = (
    TensorMapping("ff.layers.0.weight", ("mlp.up_proj.weight",)),
    TensorMapping("ff.layers.0.bias", ("mlp.up_proj.bias",)),
    TensorMapping("ff.layers.2.weight", ("mlp.down_proj.weight",)),
    TensorMapping("ff.layers.2.bias", ("mlp.down_proj.bias",)),
)

HEAD = TensorMapping("out_head.weight", ("lm_head.weight",))


def norm(name: str, hfgpt: str, gain: str, shift: str) -> tuple[TensorMapping, TensorMapping]:
    return TensorMapping(f"{name}.{gain}", (f"{hfgpt}.weight",)), TensorMapping(f"{name}.{shift}", (f"{hfgpt}.bias",))


def table(num_layers: int, tied: bool, fast: bool) -> list[TensorMapping]:
    """The table of `GPTModel`, or of `GPTModelFast`, which joins q, k and v and has torch's own LayerNorm."""
    gain, shift = ("weight", "bias") if fast else ("scale", "shift")
    if fast:
        attention = [
            TensorMapping("att.qkv.weight", tuple(f"{name}.weight" for name in QKV)),
            TensorMapping("att.qkv.bias", tuple(f"{name}.bias" for name in QKV), is_optional=True),
        ]
    else:
        attention = [
            TensorMapping(f"att.{theirs}.{kind}", (f"{ours}.{kind}",), is_optional=kind == "bias")
            for theirs, ours in zip(("W_query", "W_key", "W_value"), QKV, strict=True)
            for kind in ("weight", "bias")
        ]
    out = "att.proj" if fast else "att.out_proj"
    block = [
        *norm("norm1", "input_layernorm", gain, shift),
        *attention,
        TensorMapping(f"{out}.weight", ("self_attn.o_proj.weight",)),
        TensorMapping(f"{out}.bias", ("self_attn.o_proj.bias",)),
        *norm("norm2", "post_attention_layernorm", gain, shift),
        *MLP,
    ]
    whole = [*EMBEDDINGS, *norm("final_norm", "norm", gain, shift)]
    mappings = expand(whole, block, "trf_blocks.{layer}.", num_layers)
    return mappings if tied else [*mappings, HEAD]


def recognises(tensors: Mapping[Any, Any]) -> bool:
    """Whether tensors of these names are of this family."""
    return "tok_emb.weight" in tensors


def read(tensors: dict[str, LazyTensor | Tensor], content: dict[str, Any], told: Unsaid) -> SourceModel:
    """Understand a file's content.

    Args:
        tensors: by their names.
        content: what else the file holds.
        told: the number of attention heads, without GPT-2's where the width is one of GPT-2's; the activation of the
            MLP, without the book's, tanh GELU; and the alpha of LoRA layers.

    Raises:
        ValueError: the number of heads or alpha is not to be known, or a matrix is missing.
    """
    unmerged = dict(tensors)
    merged = merge_lora(tensors, told.lora_alpha)
    classifier, notes = drop_classifier(tensors)
    is_tied, changes = drop_tied_head(tensors, "out_head.weight", "tok_emb.weight")
    sizes = read_sizes(tensors, "tok_emb.weight", "pos_emb.weight", ".ff.layers.0.weight")
    num_layers, is_fast = sizes["num_hidden_layers"], "final_norm.weight" in tensors
    heads, guesses = heads_of(sizes["hidden_size"], told.heads)
    config = HFGPTConfig(
        **sizes,
        num_attention_heads=heads,
        activation_function=told.activation or "gelu_new",
        tie_word_embeddings=is_tied,
    )
    return SourceModel(
        tensors,
        config,
        table(num_layers, is_tied, is_fast),
        logits=partial(logits, unmerged, num_layers, heads, config.activation_function, told.lora_alpha),
        dropped=r"\.att\.mask$",
        changes=[*merged, *classifier, *changes],
        guesses=guesses,
        notes=notes,
    )


def merge_lora(tensors: dict[str, LazyTensor | Tensor], alpha: float | None) -> list[Change]:
    """Put ordinary layers in the place of the book's `LinearWithLoRA`, in `tensors`; and say what was done.

    Raises:
        ValueError: there are such layers and no alpha, or the reverse, or their tensors do not fit each other.
    """
    layers = [name.removesuffix(".lora.A") for name in tensors if name.endswith(".lora.A")]
    if not layers and alpha is not None:
        raise ValueError(f"`--lora-alpha` is {alpha:g}, and the file has no LoRA layers.")
    if layers and alpha is None:
        raise ValueError(
            f"{layers[0]} and {len(layers) - 1} more have LoRA, of an alpha that the file does not say. Give "
            "`--lora-alpha`, the `alpha` of `replace_linear_with_lora`, to merge it."
        )
    changes = []
    for layer in layers:
        names = f"{layer}.linear.weight", f"{layer}.lora.A", f"{layer}.lora.B"
        weight, A, B = (tensors.get(name) for name in names)
        if weight is None or A is None or B is None:
            raise ValueError(f"{layer}: LoRA without one of {', '.join(names)}.")
        if weight.shape != (B.shape[-1], A.shape[0]) or A.shape[-1] != B.shape[0]:
            shapes = ", ".join(str(tuple(each.shape)) for each in (weight, A, B))
            raise ValueError(f"{layer}: the shapes of weight, A and B, {shapes}, are not those of LoRA.")
        tensors[f"{layer}.weight"] = LazyTensor(tuple(weight.shape), weight.dtype, partial(merge, weight, A, B, alpha))
        for name in names:
            del tensors[name]
        if f"{layer}.linear.bias" in tensors:
            tensors[f"{layer}.bias"] = tensors.pop(f"{layer}.linear.bias")
        for name, each in ((names[1], A), (names[2], B)):
            changes.append(Change(name, tuple(each.shape), f"merged into {layer}.weight", is_exact=False))
    return changes


def merge(weight: LazyTensor | Tensor, A: LazyTensor | Tensor, B: LazyTensor | Tensor, alpha: float | None) -> Tensor:
    """A weight (out, in) with what its LoRA adds: alpha / r A B, of A (in, r) and B (r, out)."""
    own, added = read_tensor(weight), (read_tensor(A).double() @ read_tensor(B).double()).T
    return (own.double() + (alpha or 0) / B.shape[0] * added).to(own.dtype)


def drop_classifier(tensors: dict[str, LazyTensor | Tensor]) -> tuple[list[Change], list[str]]:
    """Take out the head of chapter 6, which scores a text's classes; and say what was done, and what that means."""
    head, embedding = tensors.get("out_head.weight"), tensors.get("tok_emb.weight")
    if head is None or embedding is None or head.shape[0] >= embedding.shape[0] / 2:
        return [], []
    changes = [
        Change(name, tuple(tensors.pop(name).shape), "dropped: a classifier's", is_exact=False)
        for name in ("out_head.weight", "out_head.bias")
        if name in tensors
    ]
    return changes, [
        f"out_head scored {head.shape[0]} classes of a text and is dropped: the model is what was below it, and scores "
        "the next token by the token embedding."
    ]


def logits(
    tensors: dict[str, LazyTensor | Tensor],
    layers: int,
    heads: int,
    activation: str,
    lora_alpha: float | None,
    ids_BT: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The own forward pass of `GPTModel` and `GPTModelFast`: (B, T) to (B, T, V)."""
    weight = reference_forward.reader(tensors, dtype)
    is_fast = "final_norm.weight" in tensors

    def norm(x: Tensor, name: str) -> Tensor:
        gain, shift = ("weight", "bias") if is_fast else ("scale", "shift")
        return reference_forward.norm(x, weight(f"{name}.{gain}"), weight(f"{name}.{shift}"))

    def linear(x: Tensor, name: str) -> Tensor:
        if f"{name}.lora.A" in tensors:
            A, B = weight(f"{name}.lora.A"), weight(f"{name}.lora.B")
            return linear(x, f"{name}.linear") + (lora_alpha or 0) / len(B) * (x @ A @ B)
        result = x @ weight(f"{name}.weight").T
        return result + weight(f"{name}.bias") if f"{name}.bias" in tensors else result

    x = weight("tok_emb.weight")[ids_BT] + weight("pos_emb.weight")[: ids_BT.shape[1]]
    for block in (f"trf_blocks.{layer}" for layer in range(layers)):
        normed = norm(x, f"{block}.norm1")
        if is_fast:
            queries, keys, values = linear(normed, f"{block}.att.qkv").chunk(3, dim=-1)
        else:
            queries, keys, values = (linear(normed, f"{block}.att.W_{name}") for name in ("query", "key", "value"))
        attended = reference_forward.attend(queries, keys, values, heads)
        x = x + linear(attended, f"{block}.att.proj" if is_fast else f"{block}.att.out_proj")
        inner = ACT2FN[activation](linear(norm(x, f"{block}.norm2"), f"{block}.ff.layers.0"))
        x = x + linear(inner, f"{block}.ff.layers.2")
    x = norm(x, "final_norm")
    head = tensors.get("out_head.weight", tensors.get("out_head.linear.weight"))
    if head is None or head.shape[0] < tensors["tok_emb.weight"].shape[0]:  # of a classifier
        return x @ weight("tok_emb.weight").T
    return linear(x, "out_head")


def write(parts: ModelParts, file: Path) -> list[Change]:
    """Write the state dict of a `GPTModel`, as .safetensors if the file is called so.

    Its config has `qkv_bias=True`, or False if all biases of queries, keys and values are zero.

    Raises:
        ValueError: the model has another activation than tanh GELU, or another inner width than four times its own.
    """
    config, is_tied = parts.config, parts.is_tied
    check_gpt2_like(config, activation_function="gelu_new")
    mappings = table(config.num_hidden_layers, is_tied, fast=False)
    converted, changes = export_tensors(mappings, parts.tensors)
    _, changes = leave_out_zero_biases(mappings, converted, changes)
    if is_tied:
        converted["out_head.weight"] = converted["tok_emb.weight"].clone()
        changes.append(
            Change("out_head.weight", tuple(converted["out_head.weight"].shape), "copied from tok_emb.weight")
        )
    positions = config.max_position_embeddings
    for layer in range(config.num_hidden_layers):
        name = f"trf_blocks.{layer}.att.mask"
        converted[name] = torch.ones(positions, positions).triu(diagonal=1)
        changes.append(Change(name, (positions, positions), "made: the causal mask, a buffer there"))
    if file.suffix == ".safetensors":
        save_file(converted, file, metadata={"format": "pt"})
    else:
        torch.save(converted, file)
    return changes
