"""nanoGPT and its relatives, minGPT and build-nanogpt: GPT-2's names, with matrices as `nn.Linear` has them.

nanoGPT, https://github.com/karpathy/nanoGPT, saves a dictionary `ckpt.pt` with `model`, `model_args` and more;
build-nanogpt one with `model` and a `config` object; minGPT's users save the bare state dict.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from hfgpt.configuration_hfgpt import HFGPTConfig
from hfgpt.modeling_hfgpt import HFGPTForCausalLM
from hfgpt.weights.tables import (
    QKV,
    Checkpoint,
    Entry,
    Step,
    drop_tied_head,
    expand,
    heads_of,
    own_tensors,
    refuse_other_inner_width,
    settings_of,
    walk_out,
)

WHOLE_MODEL = (
    Entry("transformer.wte.weight", ("embed_tokens.weight",)),
    Entry("transformer.wpe.weight", ("embed_positions.weight",)),
    Entry("transformer.ln_f.weight", ("norm.weight",)),
    Entry("transformer.ln_f.bias", ("norm.bias",), is_optional=True),
)

EACH_BLOCK = (
    Entry("ln_1.weight", ("input_layernorm.weight",)),
    Entry("ln_1.bias", ("input_layernorm.bias",), is_optional=True),
    Entry("attn.c_attn.weight", tuple(f"{name}.weight" for name in QKV)),
    Entry("attn.c_attn.bias", tuple(f"{name}.bias" for name in QKV), is_optional=True),
    Entry("attn.c_proj.weight", ("self_attn.o_proj.weight",)),
    Entry("attn.c_proj.bias", ("self_attn.o_proj.bias",), is_optional=True),
    Entry("ln_2.weight", ("post_attention_layernorm.weight",)),
    Entry("ln_2.bias", ("post_attention_layernorm.bias",), is_optional=True),
    Entry("mlp.c_fc.weight", ("mlp.up_proj.weight",)),
    Entry("mlp.c_fc.bias", ("mlp.up_proj.bias",), is_optional=True),
    Entry("mlp.c_proj.weight", ("mlp.down_proj.weight",)),
    Entry("mlp.c_proj.bias", ("mlp.down_proj.bias",), is_optional=True),
)

HEAD = Entry("lm_head.weight", ("lm_head.weight",))

PREFIXES = ("_orig_mod.", "module.")  # of a compiled model, and of one in DistributedDataParallel


def table(num_layers: int, tied: bool) -> list[Entry]:
    rows = expand(WHOLE_MODEL, EACH_BLOCK, "transformer.h.{layer}.", num_layers)
    return rows if tied else [*rows, HEAD]


def recognises(content: Any) -> bool:
    """Whether what `torch.load` gave is of this family."""
    tensors = content.get("model", content)
    return isinstance(tensors, dict) and any(name.endswith("transformer.wte.weight") for name in tensors)


def read(content: dict[str, Any], heads: int | None, activation: str | None) -> Checkpoint:
    """Understand what `torch.load` gave.

    Args:
        content: the dictionary of the file.
        heads: number of attention heads, where the file does not say it (minGPT).
        activation: of the MLP; None takes nanoGPT's, or that of the others.

    Raises:
        ValueError: the number of heads is not to be known.
    """
    tensors = {strip(name): tensor for name, tensor in content.get("model", content).items()}
    is_tied, steps = drop_tied_head(tensors, "lm_head.weight", "transformer.wte.weight")
    (vocab_size, width), positions = tensors["transformer.wte.weight"].shape, len(tensors["transformer.wpe.weight"])
    num_layers = len([name for name in tensors if name.endswith(".ln_1.weight")])
    notes: list[str] = []
    if "model_args" in content:
        heads, dropout = content["model_args"]["n_head"], content["model_args"].get("dropout", 0.0)
        default = "gelu"
        if activation is None:
            notes.append("activation gelu, nanoGPT's since its PR 274; for an older one give `--activation gelu_new`.")
    elif "config" in content:
        heads, dropout, default = content["config"].n_head, 0.0, "gelu_new"
    else:
        heads, notes = heads_of(width, heads)
        dropout, default = 0.1, "gelu_new"
    config = HFGPTConfig(
        vocab_size=vocab_size,
        max_position_embeddings=positions,
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        activation_function=activation or default,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        tie_word_embeddings=is_tied,
    )
    masks = r"\.attn\.(masked_)?bias$"  # buffers; the dot spares `c_attn.bias`
    return Checkpoint(tensors, config, table(num_layers, is_tied), masks, steps, notes)


def strip(name: str) -> str:
    """Take off the prefixes that wrappers put before a name."""
    while name.startswith(PREFIXES):
        name = name.removeprefix(PREFIXES[0]).removeprefix(PREFIXES[1])
    return name


def write(model: HFGPTForCausalLM, file: Path) -> list[Step]:
    """Write a nanoGPT `ckpt.pt`, to sample from or, with a fresh optimizer, to go on training with `init_from=resume`.

    Raises:
        ValueError: the model has an untied output layer, another inner width than four times its own, another
            activation than nanoGPT's, or several dropouts.
    """
    config = model.config
    settings_of(model, activation_function="gelu", tie_word_embeddings=True)
    refuse_other_inner_width(model)
    settings_of(model, attn_pdrop=config.resid_pdrop, embd_pdrop=config.resid_pdrop)
    tensors, steps = walk_out(table(config.num_hidden_layers, tied=True), own_tensors(model))
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    arguments = {
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_embd": config.hidden_size,
        "block_size": config.max_position_embeddings,
        "bias": True,
        "vocab_size": config.vocab_size,
        "dropout": float(config.resid_pdrop),
    }
    content: dict[str, Any] = {"model": tensors, "model_args": arguments, "iter_num": 0, "config": {}}
    torch.save({**content, "best_val_loss": torch.tensor(1e9)}, file)
    return [*steps, Step("lm_head.weight", tuple(tensors["lm_head.weight"].shape), "written again: tied")]


class GPTConfig(SimpleNamespace):
    """Stands in for build-nanogpt's class, whose pickled objects name `__main__.GPTConfig`; it only holds fields."""


def allowed_classes() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What may be unpickled besides tensors and plain values."""
    return [(GPTConfig, "__main__.GPTConfig")]
