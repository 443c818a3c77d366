"""A text, a recipe and finished runs, as the commands meet them."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import pytest
from accelerate.state import AcceleratorState
from commands import LOOPS, RECIPE, Result, assert_refused, contents, hfgpt, unfinish


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def cache(cache_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache_folder)
        yield
    AcceleratorState._reset_state(True)


@dataclass(frozen=True)
class World:
    """A folder with a text, a recipe and a finished run of it by each loop, and what the runs said."""

    folder: Path
    said: dict[str, Result]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, cache_folder):
    folder = tmp_path_factory.mktemp("world")
    text = "\n".join(topics[name] for name in sorted(topics))[:20_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    (folder / "tiny.yaml").write_text(RECIPE)
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache_folder)
        for loop in LOOPS:
            said[loop] = hfgpt("train", "tiny.yaml", f"loop={loop}", f"output_dir=out/{loop}")
    return World(folder, said)


@pytest.fixture
def world(finished, tmp_path, monkeypatch):
    """A copy of it that a test may change, and is in."""
    folder = tmp_path / "world"
    shutil.copytree(finished.folder, folder)
    monkeypatch.chdir(folder)
    return folder


def make_files(world):
    """What the commands below are given beside the finished runs."""
    (world / "empty.txt").touch()
    (world / "short.txt").write_text("Too short.")
    (world / "latin.txt").write_bytes("café ".encode("latin-1") * 100)
    (world / "text.pdf").touch()
    (world / "lines.jsonl").write_text('{"text": "one two three"}\n' * 100)
    (world / "typo.yaml").write_text(RECIPE.replace("learning_rate", "learning_rat"))
    (world / "list.yaml").write_text("- a\n")
    finetune = [line for line in RECIPE.splitlines() if not line.startswith(("model", "tokenizer", "output_dir"))]
    (world / "finetune.yaml").write_text("\n".join(["output_dir: out/new", "init_from: small", *finetune]))
    (world / "notes").mkdir()
    (world / "notes" / "todo.txt").write_text("Not a run.")
    (world / "emptied").mkdir()

    # A run that was killed, with a checkpoint that a disk spoiled.
    killed = world / "out" / "killed"
    shutil.copytree(world / "out" / "accelerate", killed)
    unfinish(killed)
    run = (killed / "run.yaml").read_text()
    (killed / "run.yaml").write_text(run.replace("out/accelerate", "out/killed"))
    with (killed / "checkpoint-3" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")

    # A model whose tokenizer is that of a larger one.
    shutil.copytree(world / "out" / "accelerate", world / "mixed")
    small = hfgpt("train", "tiny.yaml", "output_dir=small", "tokenizer.vocab_size=300", "train.max_steps=2")
    assert small.code == 0
    for name in ("config.json", "model.safetensors"):
        shutil.copy(world / "small" / name, world / "mixed" / name)

    (world / "damaged").mkdir()
    shutil.copy(world / "small" / "config.json", world / "damaged")
    (world / "damaged" / "model.safetensors").write_bytes(b"junk")
    for name, config in [("unfitting", "{}"), ("listed", "[]")]:
        shutil.copytree(world / "small", world / name, ignore=shutil.ignore_patterns("checkpoint-*"))
        (world / name / "config.json").write_text(config)


@pytest.fixture(scope="session")
def bad_world(finished, tmp_path_factory, cache_folder):
    """One world for all bad input, since nothing of it may change."""
    folder = tmp_path_factory.mktemp("bad") / "world"
    shutil.copytree(finished.folder, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache_folder)
        make_files(folder)
    return folder


@pytest.fixture
def refuse(bad_world, monkeypatch):
    """A function that runs a command of bad input: one clear line that holds these words, and nothing has changed."""

    def run(command, *words):
        monkeypatch.chdir(bad_world)
        before = contents(bad_world)

        said = hfgpt(*command.split(" "))

        assert_refused(said, *words)
        assert contents(bad_world) == before

    return run
