"""Runs of a small recipe, and how two of them are compared."""

import json
import os
import shutil
import signal
import time

import psutil
import pytest
from accelerate.state import AcceleratorState

from hfgpt.config.loading import load_config
from hfgpt.results.card import compare_card
from hfgpt.training.signals import Stopped
from hfgpt.training.train import train

LOOPS = ["accelerate", "trainer"]
TIMINGS = {"tokens_per_second", "peak_share", "elapsed_seconds", "peak_memory_bytes"}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


def run(recipe, name, *overrides, resume=False, on_step=lambda step: None):
    """Run the recipe into `recipe.parent / name`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = recipe.parent / name
    train(load_config(recipe, [f"output_dir={folder}", *overrides]), resume=resume, on_step=on_step)
    return folder


def stop_after(step):
    """An `on_step` that ends a run as a kill would, once a step is done."""

    def stop(number):
        if number == step:
            raise KeyboardInterrupt

    return stop


def run_until_killed(recipe, name, step, *overrides):
    """Run the recipe until a step is done; what comes after the step, such as its checkpoint, does not."""
    with pytest.raises(KeyboardInterrupt):
        run(recipe, name, *overrides, on_step=stop_after(step))
    return recipe.parent / name


def metrics(folder):
    """The lines of metrics.jsonl, timing aside."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def training_lines(folder):
    return [line for line in metrics(folder) if "grad_norm" in line]


def files(folder):
    """Relative path -> content of every file that holds no timing and no name of the run's own."""
    own = {"metrics.jsonl", "results.json", "README.md", "run.yaml"}
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name not in own)
    return {str(path): (folder / path).read_bytes() for path in paths if not path.parts[0].startswith("superseded")}


def assert_same_run(one, other):
    assert metrics(one) == metrics(other)
    assert files(one).keys() == files(other).keys()
    for name, content in files(one).items():
        assert content == files(other)[name], name
    assert compare_card(one) is compare_card(other) is None  # so the cards differ as the results do
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, other)]
    for result in results:
        for key in TIMINGS:
            result.pop(key, None)
    assert results[0] == results[1]


def wait_for_step(folder, step, process, seconds=120):
    """Wait until a run has written the line of a step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (folder / "metrics.jsonl").is_file():
            text = (folder / "metrics.jsonl").read_text()
            lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
            if any(line["step"] >= step for line in lines):
                return
        assert process.poll() is None, (folder.parent / f"{folder.name}.log").read_text()[-3000:]
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come in {seconds} s")


def workers_of(process):
    """Process ids of the workers that a launcher has started."""
    return [child.pid for child in psutil.Process(process.pid).children() if "train" in child.cmdline()]


def assert_same_path(one, other, bound=1e-5):
    """Compare two runs whose sums are in another order."""
    for mine, theirs in zip(training_lines(one), training_lines(other), strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=bound)
    assert metrics(one)[-1]["val_loss"] == pytest.approx(metrics(other)[-1]["val_loss"], abs=bound)


def start_at_first_checkpoint(whole, folder):
    """Make a folder what that of a run was when it had written its first checkpoint; the lines after it are cut."""
    shutil.copytree(whole / "checkpoint-1", folder / "checkpoint-1")
    for name in ("run.yaml", "metrics.jsonl", "samples.md"):
        shutil.copyfile(whole / name, folder / name)


def send(name):
    """Send this process a signal."""
    os.kill(os.getpid(), getattr(signal, name))


def send_after(step, name):
    """An `on_step` that sends this process a signal, once a step is done."""
    return lambda number: send(name) if number == step else None


def run_to_step(recipe, name, step, *overrides, resume=False):
    """Run the recipe, and stop it by a signal at a step."""
    with pytest.raises(Stopped):
        run(recipe, name, *overrides, resume=resume, on_step=send_after(step, "SIGTERM"))
    return recipe.parent / name
