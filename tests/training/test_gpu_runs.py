"""What only a GPU can show of a run; `pytest -m gpu`."""

import os
import subprocess
import sys
from functools import wraps
from pathlib import Path

import pytest
import torch
from runs import LOOPS, metrics, run, run_to_step, training_lines
from test_signals import WITH_DROPOUT

from hfgpt.training.control import TrainingControl

FSDP2 = Path(__file__).parents[2] / "recipes/accelerate/fsdp2.yaml"

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resuming_in_half_precision_equals_never_stopping(recipe, loop, precision):
    overrides = [f"loop={loop}", f"train.precision={precision}", *WITH_DROPOUT]
    whole = run(recipe, "whole", *overrides)

    run_to_step(recipe, "stopped", 7, *overrides)
    stopped = run(recipe, "stopped", *overrides, resume=True)

    assert metrics(whole) == metrics(stopped)
    assert (whole / "model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_model_that_accelerate_splits_takes_the_same_steps(recipe, cache, loop):
    overrides = [f"loop={loop}", "train.epochs=null", "train.max_steps=20"]
    split = recipe.parent / "split"
    processes = str(torch.cuda.device_count())
    words = ["--config_file", str(FSDP2), "--num_processes", processes, "--main_process_port", "0"]
    run_words = ["-m", "hfgpt", "train", recipe, f"output_dir={split}"]
    one = run(recipe, "one", f"train.batch_size={4 * torch.cuda.device_count()}", *overrides)

    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words, *run_words, *overrides],
        env={**os.environ, "HF_DATASETS_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    for mine, theirs in zip(training_lines(split), training_lines(one), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)  # TF32 and other kernels' orders of sums


def without_waiting(method):
    """A method in which torch raises an error where the program would wait for the GPU."""

    @wraps(method)
    def wrapper(*args):
        try:
            torch.cuda.set_sync_debug_mode("error")
            return method(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return wrapper


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
@pytest.mark.parametrize("loop", LOOPS)
def test_around_a_step_nothing_waits_for_the_gpu_but_the_look_at_its_gradients(recipe, monkeypatch, loop):
    for name in ("begin_step", "end_step"):
        monkeypatch.setattr(TrainingControl, name, without_waiting(getattr(TrainingControl, name)))

    folder = run(recipe, "out", f"loop={loop}", "train.eval_every=1000", "train.save_every=0")

    assert len(training_lines(folder)) > 10
