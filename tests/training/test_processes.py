"""Several processes: the same steps as one, on however many a run goes on, and what happens when one of them dies."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from runs import DROPOUT, assert_same_run, metrics, run, training_lines

from hfgpt.checkpoint import checkpoints, newest_checkpoint, verify_checkpoint

WITH_DROPOUT = [f"model.{name}={value}" for name, value in DROPOUT.items()]


@pytest.fixture
def launch(recipe, cache):
    """A function that starts `accelerate launch` with two processes on CPU."""
    started = []

    def launch(name, *overrides, processes=2, resume=False):
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(cache)}
        words = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        words += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        words += ["--main_process_port", "0", "-m", "hfgpt", "train", str(recipe), f"output_dir={recipe.parent / name}"]
        with (recipe.parent / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, *words, *overrides, *(["--resume"] if resume else [])],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield launch
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "hfgpt" in line]


def assert_same_path(one, other, bound=1e-5):
    """Compare two runs whose sums are in another order."""
    for mine, theirs in zip(training_lines(one), training_lines(other), strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=bound)
    assert metrics(one)[-1]["val_loss"] == pytest.approx(metrics(other)[-1]["val_loss"], abs=bound)


@pytest.mark.parametrize("loop", ["accelerate", pytest.param("trainer", marks=pytest.mark.slow)])
def test_two_processes_take_the_same_fifty_steps_as_one(recipe, launch, loop):
    steps = ["train.epochs=null", "train.max_steps=50"]
    one = run(recipe, "one", f"loop={loop}", "train.batch_size=8", *steps)

    process = launch("two", f"loop={loop}", *steps)

    assert process.wait(timeout=240) == 0, (recipe.parent / "two.log").read_text()[-3000:]
    assert_same_path(recipe.parent / "two", one)


@pytest.mark.parametrize("loop", ["accelerate", pytest.param("trainer", marks=pytest.mark.slow)])
def test_a_run_goes_from_one_process_to_two_and_back_and_sees_the_same_rows(recipe, monkeypatch, launch, loop):
    steps = [f"loop={loop}", "train.epochs=null", "train.max_steps=200", "train.save_every=50"]
    one = run(recipe, "one", "train.batch_size=8", *steps)
    other = recipe.parent / "other"

    from test_stopping import at_step

    from hfgpt.stopping import Stopped

    with monkeypatch.context() as patch:
        at_step(patch, 11, "SIGTERM")
        with pytest.raises(Stopped):
            run(recipe, "other", "train.batch_size=8", *steps)
    process = launch("other", "train.batch_size=4", *steps, resume=True)
    wait_for_step(other, 20, process)
    for worker in workers_of(process):
        os.kill(worker, signal.SIGTERM)
    assert process.wait(timeout=120) != 0
    stopped_at = verify_checkpoint(newest_checkpoint(other, pytest.fail)).position.step
    assert 20 <= stopped_at < 200, (recipe.parent / "other.log").read_text()[-3000:]
    assert "stopped at step" in (recipe.parent / "other.log").read_text()
    assert "exitcode  : 75" in (recipe.parent / "other.log").read_text()

    run(recipe, "other", "train.batch_size=8", *steps, resume=True)

    assert_same_path(other, one)


def test_a_run_whose_process_is_killed_ends_and_goes_on_bit_for_bit(recipe, launch):
    overrides = ["train.epochs=null", "train.max_steps=150", "train.save_every=3", "train.keep_last=2", *WITH_DROPOUT]
    assert launch("whole", *overrides).wait(timeout=240) == 0, (recipe.parent / "whole.log").read_text()[-3000:]
    killed = recipe.parent / "killed"

    process = launch("killed", *overrides)
    wait_for_step(killed, 20, process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    started = time.monotonic()
    assert process.wait(timeout=60) != 0
    assert time.monotonic() - started < 60

    assert 18 <= verify_checkpoint(checkpoints(killed)[0]).position.step < 150
    process = launch("killed", *overrides, resume=True)
    assert process.wait(timeout=240) == 0, (recipe.parent / "killed.log").read_text()[-3000:]
    assert_same_run(recipe.parent / "whole", killed)
