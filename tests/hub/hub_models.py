"""Small real models as a run leaves them, with all that must not leave this machine beside them."""

import json
from pathlib import Path
from typing import Any

import torch
from hub_client import TOKEN

from hfgpt import HFGPTConfig, HFGPTForCausalLM
from hfgpt.config.loading import config_yaml, load_config
from hfgpt.data.tokenizer import train_tokenizer

SHAPE = {"vocab_size": 300, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
SENT = {
    *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *(
        "gpt.py",
        "loss.py",
        "loss_triton.py",
        "positions.py",
        "arguments.py",
        "configuration_hfgpt.py",
        "modeling_hfgpt.py",
    ),
    *("run.yaml", "results.json", "metrics.jsonl", "samples.md", "README.md", "loss.png"),
}
KEPT = {".env", ".lock", "training_args.bin", "notes.txt", "optimizer.pt", "checkpoint-2", "secrets.py"}


def save_model(folder: Path, seed: int = 0, **options: Any) -> None:
    """Save a model of random weights and its tokenizer."""
    torch.manual_seed(seed)
    HFGPTForCausalLM(HFGPTConfig(**SHAPE, bos_token_id=0, eos_token_id=0)).save_pretrained(folder, **options)
    train_tokenizer(["the quick brown fox jumps over the lazy dog " * 20], 300, model_max_length=32).save_pretrained(
        folder
    )


def save_run(folder: Path) -> None:
    """Save what a finished run leaves: `SENT`, which may go to the Hub, and `KEPT`."""
    save_model(folder)
    recipe = folder / "run.yaml"
    recipe.write_text("output_dir: out/demo\ndata: {source: pydoc}\ntrain: {max_steps: 2}\noptim: {warmup_steps: 1}\n")
    recipe.write_text(config_yaml(load_config(recipe)))
    (folder / "results.json").write_text(json.dumps({"val_loss": 5.0}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 5.5}\n')
    (folder / "samples.md").write_text("# Samples\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (folder / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
    (folder / ".lock").touch()
    (folder / "secrets.py").write_text(f"TOKEN = {TOKEN!r}\n")
    for name in ("training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(TOKEN.encode())
    (folder / "notes.txt").write_text(f"{folder} {TOKEN}")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(TOKEN.encode())
