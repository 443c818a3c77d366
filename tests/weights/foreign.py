"""GPT-2 in the files of other projects, put there by hand: names, layouts and headers as those projects write them."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

MATRICES = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
LLMC_ORDER = (
    "wte wpe ln_1.weight ln_1.bias attn.c_attn.weight attn.c_attn.bias attn.c_proj.weight attn.c_proj.bias "
    "ln_2.weight ln_2.bias mlp.c_fc.weight mlp.c_fc.bias mlp.c_proj.weight mlp.c_proj.bias ln_f.weight ln_f.bias"
).split()


def as_linear(gpt2):
    """GPT-2's state dict with every matrix as `nn.Linear` has it."""
    return {name: each.T.contiguous() if name.endswith(MATRICES) else each for name, each in gpt2.state_dict().items()}


def save_nanogpt(gpt2, file, prefix="", leave_out=()):
    config = gpt2.config
    arguments = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "bias": not leave_out}
    arguments |= {"block_size": config.n_positions, "vocab_size": config.vocab_size, "dropout": 0.2}
    tensors = {prefix + name: each for name, each in as_linear(gpt2).items() if not name.endswith(tuple(leave_out))}
    torch.save({"model": tensors, "model_args": arguments, "iter_num": 7, "best_val_loss": torch.tensor(3.0)}, file)


def from_scratch(gpt2, fast=False, qkv_bias=True):
    """GPT-2's tensors under the names of LLMs-from-scratch."""
    theirs = {name.removeprefix("transformer."): each for name, each in as_linear(gpt2).items()}
    result = {"tok_emb.weight": theirs["wte.weight"], "pos_emb.weight": theirs["wpe.weight"]}
    gain, shift = ("weight", "bias") if fast else ("scale", "shift")
    result |= {f"final_norm.{gain}": theirs["ln_f.weight"], f"final_norm.{shift}": theirs["ln_f.bias"]}
    result["out_head.weight"] = theirs["lm_head.weight"].clone()
    for layer in range(gpt2.config.n_layer):
        old, new = f"h.{layer}.", f"trf_blocks.{layer}."
        for number in (1, 2):
            result[f"{new}norm{number}.{gain}"] = theirs[f"{old}ln_{number}.weight"]
            result[f"{new}norm{number}.{shift}"] = theirs[f"{old}ln_{number}.bias"]
        for kind in ("weight", "bias") if qkv_bias else ("weight",):
            joined = theirs[f"{old}attn.c_attn.{kind}"]
            if fast:
                result[f"{new}att.qkv.{kind}"] = joined
            else:
                for name, part in zip(("query", "key", "value"), joined.chunk(3), strict=True):
                    result[f"{new}att.W_{name}.{kind}"] = part.contiguous()
        for kind in ("weight", "bias"):
            result[f"{new}att.{'proj' if fast else 'out_proj'}.{kind}"] = theirs[f"{old}attn.c_proj.{kind}"]
            result[f"{new}ff.layers.0.{kind}"] = theirs[f"{old}mlp.c_fc.{kind}"]
            result[f"{new}ff.layers.2.{kind}"] = theirs[f"{old}mlp.c_proj.{kind}"]
        if not fast:
            result[f"{new}att.mask"] = torch.ones(64, 64).triu(1)
    return result


def llmc_bytes(gpt2, dtype=torch.float32):
    """GPT-2 as llm.c's own exporter writes it."""
    config, tensors = gpt2.config, as_linear(gpt2)
    header = np.zeros(256, dtype="<i4")
    version = {torch.float32: 3, torch.bfloat16: 5}[dtype]
    padded = (config.vocab_size + 127) // 128 * 128
    header[:8] = [20240326, version, config.n_positions, config.vocab_size, config.n_layer, config.n_head, 32, padded]
    result = header.tobytes()
    for name in LLMC_ORDER:
        if name in ("wte", "wpe"):
            name += ".weight"
        blocks = [f"transformer.h.{layer}.{name}" for layer in range(config.n_layer)]
        for key in blocks if blocks[0] in tensors else [f"transformer.{name}"]:
            tensor = tensors[key]
            if name == "wte.weight":
                tensor = torch.cat([tensor, torch.zeros(padded - len(tensor), 32)])
            result += tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    return result


def save_in(kind, gpt2, folder):
    """Put a GPT-2 into a file of any kind that hfgpt reads."""
    file = folder / {"llm.c": "model.bin", "safetensors": "model.safetensors"}.get(kind, "model.pth")
    if kind == "nanogpt":
        save_nanogpt(gpt2, file)
    elif kind == "compiled nanogpt":
        save_nanogpt(gpt2, file, prefix="module._orig_mod.")
    elif kind == "mingpt":
        masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(2)}
        torch.save(as_linear(gpt2) | masks, file)
    elif kind == "safetensors":
        save_file(from_scratch(gpt2), file)
    elif kind in ("llms-from-scratch", "GPTModelFast"):
        torch.save(from_scratch(gpt2, fast=kind == "GPTModelFast"), file)
    elif kind == "with its optimizer":
        torch.save({"model_state_dict": from_scratch(gpt2), "optimizer_state_dict": {"state": {}}}, file)
    else:
        file.write_bytes(llmc_bytes(gpt2))
    return file


KINDS = {  # kind -> format, and the activation that its code computes
    "nanogpt": ("nanogpt", "gelu"),
    "compiled nanogpt": ("nanogpt", "gelu"),
    "mingpt": ("nanogpt", "gelu_new"),
    "llms-from-scratch": ("llms-from-scratch", "gelu_new"),
    "GPTModelFast": ("llms-from-scratch", "gelu_new"),
    "with its optimizer": ("llms-from-scratch", "gelu_new"),
    "safetensors": ("llms-from-scratch", "gelu_new"),
    "llm.c": ("llm.c", "gelu_new"),
}
HEADS_UNKNOWN = [kind for kind, (form, _) in KINDS.items() if form == "llms-from-scratch" or kind == "mingpt"]


class Canary:
    """Unpickled, it would make a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))
