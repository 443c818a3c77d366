"""The end of a run: the weights are there before the long scoring, which a stop or a kill does not waste."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import LOOPS, assert_same_run, metrics, run, send
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hfgpt.config.loading import load_config
from hfgpt.training import evaluate
from hfgpt.training.checkpoint import checkpoints, verify_checkpoint
from hfgpt.training.evaluate import PartialScores, score_rows
from hfgpt.training.signals import Stopped

FEW = ["train.eval_rows=6", "train.epochs=null", "train.max_steps=40"]
"""Rows that are no whole number of parts of four."""
IN_TRAINING = 8 * 4
"""Parts that are scored before: eight evaluations of two parts of each split."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(evaluate, "PART_ROWS", 4)


@pytest.fixture
def scored(monkeypatch):
    """The rows of each part that is scored, in this process."""
    parts = []

    def count(run, rows, *rest):
        parts.append(len(rows))
        return score_rows(run, rows, *rest)

    monkeypatch.setattr(evaluate, "score_rows", count)
    return parts


def run_until_killed_while_scoring(recipe, name, *overrides, parts=3):
    """Run the recipe in a process of its own, which is killed when some parts of the rows are scored at the end."""
    folder = recipe.parent / name
    program = Path(__file__).with_name("odd_run.py")
    done = subprocess.run(
        [sys.executable, program, "train", recipe, f"output_dir={folder}", *overrides],
        env={**os.environ, "KILLED_AT_PART": str(parts)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_killed_while_it_scores_at_the_end_has_its_weights_and_goes_on_there(recipe, cache, scored, loop):
    overrides = [*FEW, f"loop={loop}"]
    whole = run(recipe, "whole", *overrides)
    at_the_end = len(scored) - IN_TRAINING
    scored.clear()

    killed = run_until_killed_while_scoring(recipe, "killed", *overrides)

    assert not (killed / "results.json").exists()
    weights = load_file(killed / "model.safetensors")
    assert all(weights[name].equal(each) for name, each in load_file(whole / "model.safetensors").items())
    assert AutoModelForCausalLM.from_pretrained(killed).num_parameters() > 0
    run(recipe, "killed", *overrides, resume=True)
    assert len(scored) == at_the_end - 3 > 3
    assert_same_run(whole, killed)
    assert not list(killed.rglob("final_scores.jsonl"))


def test_the_losses_at_the_end_are_made_of_the_same_parts_as_those_of_an_evaluation(recipe, scored):
    folder = run(recipe, "out", *FEW)

    results = json.loads((folder / "results.json").read_text())
    final = scored[IN_TRAINING:]
    assert sum(final) == 2 * results["validation_rows"]  # no row twice, though the first ones are compared besides
    assert results["scored_validation_rows"] == results["validation_rows"]
    assert results["eval_rows_val_loss"] != results["val_loss"]


@pytest.mark.parametrize("torn", [b'{"step": 40, "split": "tra', b"\0\0\0"])
def test_a_score_that_a_kill_has_torn_is_made_again(recipe, cache, scored, torn):
    whole = run(recipe, "whole", *FEW)
    killed = run_until_killed_while_scoring(recipe, "killed", *FEW)
    with (killed / "checkpoint-40/final_scores.jsonl").open("ab") as file:
        file.write(torn)

    assert_same_run(whole, run(recipe, "killed", *FEW, resume=True))


def test_a_run_with_patience_goes_on_scoring_its_best_weights(recipe, cache, scored):
    overrides = ["optim.learning_rate=0.3", "optim.schedule=constant", "train.eval_every=3", "train.patience=2"]
    overrides += ["train.eval_rows=6"]
    whole = run(recipe, "whole", *overrides)
    best = json.loads((whole / "results.json").read_text())["step"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINAL_STEP", str(best))
        killed = run_until_killed_while_scoring(recipe, "killed", *overrides, parts=3)

    assert (killed / "model.safetensors").read_bytes() == (killed / f"checkpoint-{best}/model.safetensors").read_bytes()
    scored.clear()
    run(recipe, "killed", *overrides, resume=True)
    assert 0 < len(scored) < 12
    assert_same_run(whole, killed)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("save_every", [4, 0])
def test_a_run_stopped_while_it_scores_at_the_end_says_where_its_weights_are(recipe, monkeypatch, loop, save_every):
    overrides = [*FEW, f"loop={loop}", f"train.save_every={save_every}"]
    whole = run(recipe, "whole", *overrides)

    class Stopping(PartialScores):
        def add(self, *part):
            super().add(*part)
            if self.step == 40 and len(self.scores) == 3:
                send("SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr("hfgpt.training.finish.PartialScores", Stopping)
        with pytest.raises(Stopped, match=r"step 40 of 40.*from checkpoint-40 with .*weights are in .*/stopped\."):
            run(recipe, "stopped", *overrides)

    stopped = recipe.parent / "stopped"
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert verify_checkpoint(checkpoints(stopped)[0]).state.step == 40
    run(recipe, "stopped", *overrides, resume=True)
    if save_every:
        assert_same_run(whole, stopped)
    assert metrics(whole) == metrics(stopped)


def test_a_run_that_trains_its_last_steps_again_scores_them_anew(recipe, cache, scored):
    killed = run_until_killed_while_scoring(recipe, "killed", *FEW)

    run(recipe, "killed", *FEW, resume=str(killed / "checkpoint-36"))

    rows = json.loads((killed / "results.json").read_text())["validation_rows"]
    assert sum(scored) == 2 * rows


@pytest.mark.parametrize(
    ("loop", "engine"),
    [
        ("accelerate", "ddp"),
        pytest.param("trainer", "ddp", marks=pytest.mark.slow),
        pytest.param("accelerate", "fsdp2", marks=pytest.mark.slow),
        pytest.param("trainer", "fsdp2", marks=pytest.mark.slow),
    ],
)
def test_of_several_processes_too(recipe, launch, monkeypatch, engine, loop):
    overrides = [f"loop={loop}", "train.eval_rows=8", "train.batch_size=2"]

    def launched(name, resume=False):
        code = launch(name, *overrides, engine=engine, resume=resume).wait(timeout=240)
        return code, (recipe.parent / f"{name}.log").read_text()

    monkeypatch.setenv("KILLED_AT_PART", "1000")  # never, but with parts as small
    code, log = launched("whole")
    assert code == 0, log[-3000:]
    monkeypatch.setenv("KILLED_AT_PART", "3")
    code, _ = launched("killed")
    assert code != 0
    killed = recipe.parent / "killed"
    assert not (killed / "results.json").exists()
    assert AutoModelForCausalLM.from_pretrained(killed).num_parameters() > 0

    monkeypatch.setenv("KILLED_AT_PART", "1000")
    code, log = launched("killed", resume=True)

    assert code == 0, log[-3000:]
    assert "scoring 18 rows, of which" in log
    assert_same_run(recipe.parent / "whole", killed)


def test_fewer_rows_can_be_scored_at_the_end_and_the_results_and_the_card_say_so(recipe, scored, capsys):
    all_rows = run(recipe, "all", *FEW)
    folder = run(recipe, "few", *FEW, "train.final_eval_rows=7")

    results, of_all = (json.loads((each / "results.json").read_text()) for each in (folder, all_rows))
    rows = results["validation_rows"]
    assert (results["scored_validation_rows"], of_all["scored_validation_rows"]) == (7, rows)
    assert results["val_loss"] != of_all["val_loss"]
    assert results["bigram_perplexity"] != of_all["bigram_perplexity"]  # of the same tokens
    assert results["bits_per_byte"] != of_all["bits_per_byte"]
    card, card_of_all = ((each / "README.md").read_text() for each in (folder, all_rows))
    assert f"Scored on a part of the validation text only, the first 7 of {rows} rows." in card
    assert "Scored on a part" not in card_of_all
    assert f"over 7 of {rows} validation rows" in capsys.readouterr().err


def test_a_run_says_what_its_numbers_show(recipe, capsys):
    run(recipe, "out", "train.epochs=2")

    said = capsys.readouterr().err
    assert "is no better than that of counting which token follows which" in said
    assert "the validation loss still fell at the end" in said
    assert "tokens of validation text are few" in said


def test_a_run_that_was_killed_while_it_scored_may_go_on_with_fewer_rows(recipe, cache, scored):
    whole = run(recipe, "whole", *FEW, "train.final_eval_rows=7")
    killed = run_until_killed_while_scoring(recipe, "killed", *FEW)

    run(recipe, "killed", *FEW, "train.final_eval_rows=7", resume=True)

    assert_same_run(whole, killed)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.final_eval_rows=-1"], r"`train\.final_eval_rows` must be at least 0, got -1"),
        (["train.final_eval_rows=5", "train.eval_rows=6"], r"`train\.final_eval_rows` \(5\) is below .* \(6\)"),
        (["train.final_eval_rows=5", "train.eval_rows=0"], r"below `train\.eval_rows` \(0: all rows\)"),
    ],
)
def test_rows_that_say_less_than_those_before_are_refused(recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(recipe, overrides)
