"""A run that is asked to stop, at any place, loses nothing; and no two runs write into one folder."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from runs import DROPOUT, LOOPS, assert_same_run, metrics, run, send, send_after

from hfgpt.cli import app
from hfgpt.config.loading import load_config
from hfgpt.evaluation.loss import score_batches
from hfgpt.training.checkpoint import best_checkpoint, checkpoints, newest_checkpoint, verify_checkpoint
from hfgpt.training.recorder import Recorder
from hfgpt.training.run import open_run
from hfgpt.training.signals import RESUMABLE, SIGNALS, Stopped, StopRequest
from hfgpt.training.train import train

WITH_DROPOUT = [f"model.{name}={value}" for name, value in DROPOUT.items()]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_in_training_leaves_a_checkpoint_within_one_step(recipe, loop, name):
    overrides = [f"loop={loop}", "train.save_every=1000", "train.eval_every=1000", *WITH_DROPOUT]
    whole = run(recipe, "whole", *overrides)
    before = signal.getsignal(signal.SIGTERM)

    with pytest.raises(Stopped, match=r"stopped at step [78] of 40, as asked. It goes on from checkpoint-[78]"):
        run(recipe, "stopped", *overrides, on_step=send_after(7, name))

    stopped = recipe.parent / "stopped"
    [newest] = checkpoints(stopped)
    assert verify_checkpoint(newest).state.step in (7, 8)
    assert not (stopped / "results.json").exists()
    assert signal.getsignal(signal.SIGTERM) == before
    run(recipe, "stopped", *overrides, resume=True)
    assert metrics(stopped) == metrics(whole)
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_in_another_thread_is_the_same_run_and_leaves_signals_alone(recipe, loop, workers):
    overrides = [f"loop={loop}", f"data.num_workers={workers}", *WITH_DROPOUT]
    here = run(recipe, "here", *overrides)
    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    during = {}

    def look(step):
        during.update({name: signal.getsignal(getattr(signal, name)) for name in SIGNALS})

    with ThreadPoolExecutor(1) as thread:
        there = thread.submit(run, recipe, "there", *overrides, on_step=look).result()

    assert during == before
    assert metrics(there) == metrics(here)
    assert (there / "model.safetensors").read_bytes() == (here / "model.safetensors").read_bytes()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("place", ["the first evaluation", "an evaluation", "the last evaluation", "saving"])
def test_a_signal_anywhere_else_is_obeyed_too_and_loses_nothing(recipe, monkeypatch, loop, place):
    overrides = [f"loop={loop}", *WITH_DROPOUT]
    whole = run(recipe, "whole", *overrides)
    calls = {"evaluations": 0}

    def with_signal(model, batches):
        calls["evaluations"] += 1
        # Two splits each time: at step 0, 5, 10, ...; forty steps make eight evaluations and the last one.
        if calls["evaluations"] == {"the first evaluation": 1, "an evaluation": 6, "the last evaluation": 18}[place]:
            send("SIGTERM")
        return score_batches(model, batches)

    def saving(*arguments):
        if arguments[1].state.step == 8:
            send("SIGTERM")
        return commit(*arguments)

    from hfgpt.training import checkpoint

    commit = checkpoint.save_checkpoint
    with monkeypatch.context() as patch:
        if place == "saving":
            patch.setattr("hfgpt.training.checkpoint.save_checkpoint", saving)
        else:
            patch.setattr("hfgpt.training.evaluate.score_batches", with_signal)
        with pytest.raises(Stopped):
            run(recipe, "stopped", *overrides)
    newest = newest_checkpoint(recipe.parent / "stopped", pytest.fail)
    assert (newest and newest.name) in {
        "the first evaluation": [None],
        "an evaluation": ["checkpoint-10"],
        "the last evaluation": ["checkpoint-40"],
        "saving": ["checkpoint-8", "checkpoint-9"],
    }[place]
    extra = newest if newest is not None and newest.name not in {each.name for each in checkpoints(whole)} else None
    stopped = run(recipe, "stopped", *overrides, resume=True)

    assert metrics(whole) == metrics(stopped)
    if extra is None:
        assert_same_run(whole, stopped)


def test_a_second_ctrl_c_ends_at_once():
    with StopRequest() as stop:
        send("SIGINT")
        assert stop.is_made()
        with pytest.raises(KeyboardInterrupt):
            send("SIGINT")


def test_a_signal_after_the_run_is_as_before_it():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("own"))
    try:
        with StopRequest() as stop:
            send("SIGTERM")
        send("SIGTERM")
    finally:
        signal.signal(signal.SIGTERM, before)

    assert stop.signal == "SIGTERM"
    assert heard == ["own"]


def test_the_command_line_says_where_to_go_on_and_exits_with_75(recipe, monkeypatch, capsys):
    log_step = Recorder.log_step

    def with_signal(recorder, step, *rest):
        log_step(recorder, step, *rest)
        if step == 3:
            send("SIGUSR1")

    monkeypatch.setattr(Recorder, "log_step", with_signal)

    assert app(["train", str(recipe)], standalone_mode=False) == RESUMABLE == 75

    assert "as asked. It goes on from checkpoint-" in capsys.readouterr().err


def test_a_second_run_in_the_same_folder_is_refused(recipe, cache):
    config = load_config(recipe)
    held = open_run(config)
    before = {path.name: path.read_bytes() for path in held.folder.iterdir()}

    with pytest.raises(ValueError, match=r"another process is writing into `output_dir`"):
        train(config, resume=True)

    assert {path.name: path.read_bytes() for path in held.folder.iterdir()} == before
    held.lock.release()
    assert train(config, resume=True)["step"] == 40


def test_a_lock_does_not_outlive_its_process(recipe, cache):
    program = (
        "import os, sys; from hfgpt.config.loading import load_config; from hfgpt.training.run import open_run\n"
        "held = open_run(load_config(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache)}

    killed = subprocess.run([sys.executable, "-c", program, str(recipe)], env=environment, capture_output=True)

    assert killed.returncode == -9, killed.stderr[-2000:]
    assert (recipe.parent / "out/run.yaml").is_file()
    assert train(load_config(recipe), resume=True)["step"] == 40


def test_the_checkpoint_with_the_lowest_validation_loss_is_kept(recipe):
    # A learning rate that spoils the model again: the best checkpoint is none of the last.
    folder = run(
        recipe, "out", "train.save_every=5", "train.keep_last=1", "optim.learning_rate=1", "optim.schedule=constant"
    )

    losses = {
        line["step"]: line["val_loss"] for line in metrics(folder) if "val_loss" in line and 0 < line["step"] < 40
    }
    best = min(losses, key=losses.get)
    assert best < 35
    assert best_checkpoint(folder).name == f"checkpoint-{best}"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-40", f"checkpoint-{best}"]
    assert verify_checkpoint(folder / f"checkpoint-{best}").val_loss == losses[best]


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_a_sigterm_to_workers_and_all_leaves_a_checkpoint_too(recipe, cache, loop):
    # As a service manager does. The workers would die of it, and the run of their death.
    words = [f"loop={loop}", "data.num_workers=2", "train.epochs=null", "train.max_steps=3000", "train.save_every=0"]
    with subprocess.Popen(
        [sys.executable, "-m", "hfgpt", "train", recipe, *words],
        env={**os.environ, "HF_DATASETS_CACHE": str(cache)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        for line in process.stderr:
            if line.startswith("step ") and "step 0/" not in line:
                break
        os.killpg(process.pid, signal.SIGTERM)
        said = process.stderr.read()

    assert process.returncode == RESUMABLE, said
    assert "as asked. It goes on from checkpoint-" in said
