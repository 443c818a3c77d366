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
from hfgpt.weights.model_parts import ModelParts, SourceModel
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


def read(
    tensors: dict[str, LazyTensor | Tensor], content: dict[str, Any], heads: int | None, activation: str | None
) -> SourceModel:
    """Understand a file's content.

    Args:
        tensors: by their names.
        content: what else the file holds.
        heads: number of attention heads; None takes GPT-2's, where the width is one of GPT-2's.
        activation: of the MLP; None takes the book's, tanh GELU.

    Raises:
        ValueError: the number of heads is not to be known, or a matrix is missing.
    """
    is_tied, changes = drop_tied_head(tensors, "out_head.weight", "tok_emb.weight")
    sizes = read_sizes(tensors, "tok_emb.weight", "pos_emb.weight", ".ff.layers.0.weight")
    num_layers, is_fast = sizes["num_hidden_layers"], "final_norm.weight" in tensors
    heads, guesses = heads_of(sizes["hidden_size"], heads)
    config = HFGPTConfig(
        **sizes,
        num_attention_heads=heads,
        activation_function=activation or "gelu_new",
        tie_word_embeddings=is_tied,
    )
    return SourceModel(
        tensors,
        config,
        table(num_layers, is_tied, is_fast),
        logits=partial(logits, tensors, num_layers, heads, config.activation_function),
        dropped=r"\.att\.mask$",
        changes=changes,
        guesses=guesses,
    )


def logits(
    tensors: dict[str, LazyTensor | Tensor],
    layers: int,
    heads: int,
    activation: str,
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
    head = weight("out_head.weight" if "out_head.weight" in tensors else "tok_emb.weight")
    return norm(x, "final_norm") @ head.T


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
