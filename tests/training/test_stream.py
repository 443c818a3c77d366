"""A run on text that is read as it comes: the same promises as on text that is stored."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from runs import DROPOUT, LOOPS, files, metrics, run, run_to_step

from hfgpt.data.tokenizer import train_tokenizer
from hfgpt.training.checkpoint import checkpoints, seal, unseal


@pytest.fixture
def recipe(tmp_path, cache):
    """A recipe of 24 steps, some epochs, on the paragraphs of a text."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    paragraphs = [part for part in text.split("\n\n") if part.strip()][:50]
    lines = "\n".join(json.dumps({"text": part}) for part in paragraphs)
    (tmp_path / "text.jsonl").write_text(lines, encoding="utf-8")
    train_tokenizer(paragraphs, 300, model_max_length=64).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "output_dir": str(tmp_path / "out"),
                "model": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **DROPOUT},
                "tokenizer": {"name": str(tmp_path / "tokenizer")},
                "data": {
                    "files": str(tmp_path / "text.jsonl"),
                    "streaming": True,
                    "shuffle_buffer": 8,
                    "validation_documents": 5,
                    "block_size": 64,
                },
                "optim": {"warmup_steps": 3},
                "train": {"max_steps": 24, "batch_size": 8, "gradient_accumulation_steps": 2, "eval_every": 8}
                | {"save_every": 6, "keep_last": 20},
                "sample": {"max_new_tokens": 8},
            }
        )
    )
    return tmp_path / "recipe.yaml"


def test_trainer_walks_the_same_path_through_a_stream(recipe):
    without_dropout = [f"model.{name}=0.0" for name in DROPOUT]

    one, other = (run(recipe, loop, f"loop={loop}", *without_dropout) for loop in LOOPS)

    assert metrics(one) == metrics(other)
    assert torch.equal(*(torch.load(path / "checkpoint-24" / "stream_0.pt")["ids"] for path in (one, other)))
    assert files(one).keys() == files(other).keys()
    assert "train_tokens" not in json.loads((one / "results.json").read_text())


@pytest.mark.parametrize("loop", LOOPS)
def test_resuming_in_a_stream_equals_never_stopping(recipe, loop):
    whole = run(recipe, "whole", f"loop={loop}")

    for step in (7, 18):
        run_to_step(recipe, "stopped", step, f"loop={loop}", resume=True)
    stopped = run(recipe, "stopped", f"loop={loop}", resume=True)

    assert metrics(whole) == metrics(stopped)
    for name in ("model.safetensors", "checkpoint-24/stream_0.pt", "checkpoint-24/optimizer.pt"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()


def test_a_stream_goes_on_with_as_many_processes_only(recipe):
    manifest = checkpoints(run_to_step(recipe, "stopped", 7))[0] / "manifest.json"

    content = unseal(manifest.read_text())
    content["identity"]["number of processes"] = 2
    manifest.write_text(seal(content))

    with pytest.raises(ValueError, match="was written with another number of processes: 2, now 1"):
        run(recipe, "stopped", resume=True)
