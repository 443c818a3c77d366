"""Several processes: the same steps as one, on however many a run goes on, and what happens when one of them dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from runs import DROPOUT, assert_same_path, assert_same_run, run, run_to_step, wait_for_step, workers_of

from hfgpt.distributed.launch import configure_engine, join_processes
from hfgpt.training.checkpoint import checkpoints, newest_checkpoint, verify_checkpoint

CONFIGURATIONS = Path(__file__).parents[2] / "recipes/accelerate"
WITH_DROPOUT = [f"model.{name}={value}" for name, value in DROPOUT.items()]


@pytest.mark.parametrize("loop", ["accelerate", pytest.param("trainer", marks=pytest.mark.slow)])
def test_two_processes_take_the_same_fifty_steps_as_one(recipe, launch, loop):
    steps = ["train.epochs=null", "train.max_steps=50"]
    one = run(recipe, "one", f"loop={loop}", "train.batch_size=8", *steps)

    process = launch("two", f"loop={loop}", *steps)

    assert process.wait(timeout=240) == 0, (recipe.parent / "two.log").read_text()[-3000:]
    assert_same_path(recipe.parent / "two", one)
    environment = json.loads((recipe.parent / "two/results.json").read_text())["environment"]
    assert (environment["processes"], environment["engine"]) == (2, "DDP")
    assert "processes: 2 (DDP)" in (recipe.parent / "two/README.md").read_text()


@pytest.mark.parametrize("loop", ["accelerate", pytest.param("trainer", marks=pytest.mark.slow)])
def test_a_run_goes_from_one_process_to_two_and_back_and_sees_the_same_rows(recipe, launch, loop):
    steps = [f"loop={loop}", "train.epochs=null", "train.max_steps=200", "train.save_every=50"]
    one = run(recipe, "one", "train.batch_size=8", *steps)

    other = run_to_step(recipe, "other", 11, "train.batch_size=8", *steps)
    process = launch("other", "train.batch_size=4", *steps, resume=True)
    wait_for_step(other, 20, process)
    for worker in workers_of(process):
        os.kill(worker, signal.SIGTERM)
    assert process.wait(timeout=120) != 0
    stopped_at = verify_checkpoint(newest_checkpoint(other, pytest.fail)).state.step
    assert 20 <= stopped_at < 200, (recipe.parent / "other.log").read_text()[-3000:]
    assert "stopped at step" in (recipe.parent / "other.log").read_text()
    assert "exitcode  : 75" in (recipe.parent / "other.log").read_text()

    run(recipe, "other", "train.batch_size=8", *steps, resume=True)

    assert_same_path(other, one)


@pytest.mark.parametrize("loop", ["accelerate", pytest.param("trainer", marks=pytest.mark.slow)])
def test_a_model_split_over_two_processes_takes_the_same_steps_and_goes_on_in_one(recipe, launch, loop):
    steps = [f"loop={loop}", "train.epochs=null", "train.max_steps=60", "train.save_every=30", "train.shard=true"]
    one = run(recipe, "one", "train.batch_size=8", *steps)
    other = recipe.parent / "other"

    process = launch("other", *steps)
    wait_for_step(other, 12, process)
    os.kill(process.pid, signal.SIGTERM)  # the launcher, as a scheduler does; it passes it on
    assert process.wait(timeout=120) != 0
    log = (recipe.parent / "other.log").read_text()
    assert "as asked. It goes on from checkpoint-" in log, log[-3000:]
    assert 12 <= verify_checkpoint(newest_checkpoint(other, pytest.fail)).state.step < 60
    run(recipe, "other", "train.batch_size=8", *steps, resume=True)

    assert_same_path(other, one)
    assert {path.name for path in one.glob("*.*")} == {path.name for path in other.glob("*.*")}
    assert (other / "config.json").read_bytes() == (one / "config.json").read_bytes()


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

    assert 18 <= verify_checkpoint(checkpoints(killed)[0]).state.step < 150
    process = launch("killed", *overrides, resume=True)
    assert process.wait(timeout=240) == 0, (recipe.parent / "killed.log").read_text()[-3000:]
    assert_same_run(recipe.parent / "whole", killed)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"ACCELERATE_USE_MEGATRON_LM": "true"},
            r"asks for Megatron-LM, which hfgpt does not drive. `train.shard=true`",
        ),
        ({"WORLD_SIZE": "2"}, r"2 processes were started, but each is alone"),
        (
            # What `accelerate launch --cpu --num_processes 2` and a configuration with MULTI_CPU set.
            {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true", "MASTER_PORT": "29500"},
            r"`accelerate launch` was asked for several processes and started one",
        ),
    ],
)
def test_a_launch_that_is_not_what_was_asked_for_is_refused(monkeypatch, environment, message):
    from accelerate import PartialState

    PartialState()  # as in a process that is alone
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(ValueError, match=message):
        join_processes()


def test_an_engine_that_did_not_come_is_refused(monkeypatch):
    accelerator = Accelerator(cpu=True)
    configure_engine(accelerator)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")

    with pytest.raises(ValueError, match=r"asks for FSDP, and accelerate gives NO: it splits models on GPUs only"):
        configure_engine(accelerator)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cpu", "--num_processes", "2"], "was asked for several processes and started one"),
        (
            ["--config_file", str(CONFIGURATIONS / "fsdp2.yaml"), "--main_process_port", "0"],
            "asks for FSDP, and accelerate gives MULTI_CPU",
        ),
        (
            ["--config_file", str(CONFIGURATIONS / "deepspeed.yaml"), "--main_process_port", "0"],
            "asks for DeepSpeed, and accelerate gives MULTI_CPU: ACCELERATE_USE_CPU",
        ),
    ],
)
def test_real_launches_that_are_not_what_was_asked_for_are_refused(recipe, cache, words, message):
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words, "-m", "hfgpt", "train", str(recipe)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr.partition("error: ")[0]


@pytest.mark.parametrize("path", sorted(CONFIGURATIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_configuration(path):
    config = load_config_from_file(str(path))

    assert config.num_processes == 2
    engines = {"fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}
    assert config.distributed_type.value == engines.get(path.stem, "MULTI_GPU")
    assert config.mixed_precision == "no"  # or it would be another run than the recipe says


def test_a_split_model_that_is_compiled_is_refused(recipe):
    with pytest.raises(ValueError, match=r"`train.shard` does not go with `train.compile` \(True\) yet"):
        run(recipe, "out", "train.shard=true", "train.compile=true")
