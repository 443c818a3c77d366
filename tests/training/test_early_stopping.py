"""Training ends when it does no good any more, the same in both loops and after any stop, and keeps what was best."""

import json
import shutil

import pytest
import torch
from runs import DROPOUT, LOOPS, assert_same_run, metrics, run, run_until_killed
from safetensors.torch import load_file

from hfgpt.config.loading import load_config
from hfgpt.evaluation.loss import score_batches
from hfgpt.results.records import best_evaluation
from hfgpt.training.early_stopping import is_patience_spent
from hfgpt.training.signals import Stopped

# A learning rate that spoils the model after a few steps, so that the best evaluation lies in the middle.
SPOILT = ["optim.learning_rate=0.3", "optim.schedule=constant", "train.eval_every=3", "train.save_every=7"]
SPOILT += ["sample.max_new_tokens=0"]
PATIENT = [*SPOILT, "train.patience=2", *(f"model.{name}={value}" for name, value in DROPOUT.items())]


def evaluations(*losses):
    return [{"step": step, "val_loss": loss} for step, loss in enumerate(losses)]


def test_the_best_evaluation_is_the_first_of_the_lowest_and_never_that_before_training():
    assert best_evaluation([]) is None
    assert best_evaluation(evaluations(1.0)) is None
    assert best_evaluation(evaluations(1.0, 3.0, 2.0, 2.0, 2.5))["step"] == 2


@pytest.mark.parametrize(
    ("losses", "spent_at"),
    [
        ([5, 4, 3, 2, 1], None),
        ([5, 4, 4, 4], 3),  # as good is no better
        ([5, 4, 4.1, 3.9, 4.2, 4.3], 5),
        ([1, 5, 4, 3], None),  # worse than before training, but getting better
        ([5], None),
    ],
)
def test_patience_is_spent_after_so_many_evaluations_without_a_lower_loss(losses, spent_at):
    lines = evaluations(*losses)

    spent = [step for step in range(len(lines)) if is_patience_spent(lines[: step + 1], patience=2)]

    assert spent == ([] if spent_at is None else list(range(spent_at, len(lines))))


@pytest.fixture(scope="module")
def losses_of():
    """Validation losses by step, from metrics.jsonl."""
    return lambda folder: {line["step"]: line["val_loss"] for line in metrics(folder) if "val_loss" in line}


def test_a_run_ends_by_itself_in_both_loops_alike_and_holds_the_best_weights(recipe, losses_of, capsys):
    one, other = (run(recipe, loop, f"loop={loop}", *PATIENT) for loop in LOOPS)

    assert_same_run(one, other)
    losses = losses_of(one)
    last, best = max(losses), min(losses, key=losses.get)
    assert 0 < best == last - 6 < last < 40  # two evaluations, three steps apart, were no better
    assert torch.equal(
        *(load_file(folder / "model.safetensors")["model.norm.weight"] for folder in (one, one / f"checkpoint-{best}"))
    )
    results = json.loads((one / "results.json").read_text())
    assert (results["step"], results["best_step"], results["last_step"]) == (best, best, last)
    assert results["best_val_loss"] == losses[best] == results["val_loss"]  # eval_rows are all rows here
    assert results["loss_gap"] == results["val_loss"] - results["train_loss"]
    assert f"the validation loss was lowest at step {best} of {last}" in capsys.readouterr().err


@pytest.mark.parametrize("loop", LOOPS)
def test_a_stop_anywhere_changes_nothing_of_when_it_ends(recipe, monkeypatch, losses_of, loop):
    whole = run(recipe, "whole", f"loop={loop}", *PATIENT)
    last = max(losses_of(whole))
    calls = []

    def while_evaluating(model, batches):
        calls.append(model)
        if len(calls) == 2 * (last // 3) + 1:  # the training rows of the last evaluation
            raise Stopped
        return score_batches(model, batches)

    def after_the_end(*_):
        raise KeyboardInterrupt

    run_until_killed(recipe, "between evaluations", last - 1, f"loop={loop}", *PATIENT)
    resumed = run(recipe, "between evaluations", f"loop={loop}", *PATIENT, resume=True)
    assert_same_run(whole, resumed)
    for place, stop in [
        ("hfgpt.training.evaluate.score_batches", while_evaluating),
        ("hfgpt.training.finish.ngram_perplexities", after_the_end),
    ]:
        name = stop.__name__
        with monkeypatch.context() as patch:
            patch.setattr(place, stop)
            with pytest.raises((KeyboardInterrupt, Stopped)):
                run(recipe, name, f"loop={loop}", *PATIENT)
        assert not (recipe.parent / name / "results.json").exists()
        assert_same_run(whole, run(recipe, name, f"loop={loop}", *PATIENT, resume=True))


def test_a_patient_run_that_never_gets_worse_goes_to_its_end_and_scores_its_last_step_like_the_others(
    recipe, losses_of
):
    patient = run(recipe, "patient", "train.patience=3", "train.eval_every=7")
    plain = run(recipe, "plain", "train.eval_every=7")

    assert list(losses_of(patient)) == [0, 7, 14, 21, 28, 35, 40]
    assert losses_of(patient) == losses_of(plain)
    assert (patient / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


def test_without_patience_the_last_weights_are_kept_and_overfitting_is_said(recipe, losses_of, capsys):
    folder = run(recipe, "out", *SPOILT)

    losses = losses_of(folder)
    best = min((step for step in losses if step), key=losses.get)
    results = json.loads((folder / "results.json").read_text())
    assert (results["step"], results["last_step"], results["best_step"]) == (40, 40, best)
    assert results["best_val_loss"] == losses[best] < results["val_loss"]
    said = capsys.readouterr().err
    assert f"the validation loss was lowest at step {best} of 40 ({losses[best]:.3f}, and {losses[40]:.3f}" in said
    assert "`train.patience` stops in time" in said
    assert f"(best {losses[best]:.3f} at step {best})" in said  # in the lines of the evaluations after it


def test_the_last_evaluation_is_compared_with_the_others_on_their_rows_and_not_on_all(recipe, losses_of, capsys):
    few = ["train.eval_rows=2", "train.eval_every=5", "train.epochs=null", "optim.schedule=constant"]
    out = run(recipe, "out", *few, "train.max_steps=10")
    said = capsys.readouterr().err
    longer = run(recipe, "longer", *few, "train.max_steps=15")

    results = json.loads((out / "results.json").read_text())
    assert results["eval_rows_val_loss"] == losses_of(longer)[10]  # what it would have been in the middle of a run
    assert results["val_loss"] == losses_of(out)[10] != losses_of(longer)[10]
    best = min((5, 10), key=losses_of(longer).get)
    assert (results["best_step"], results["best_val_loss"]) == (best, losses_of(longer)[best])
    assert "over all validation rows" in said


def test_patience_without_checkpoints_is_refused(recipe):
    with pytest.raises(ValueError, match=r"`train\.patience` \(2\) keeps the best weights in a checkpoint"):
        load_config(recipe, ["train.patience=2", "train.save_every=0"])
    with pytest.raises(ValueError, match=r"`train\.patience` must be at least 1, got 0"):
        load_config(recipe, ["train.patience=0"])


def test_a_run_that_has_lost_its_best_checkpoint_keeps_no_other_weights_instead(recipe, losses_of):
    folder = run(recipe, "out", *PATIENT)
    losses = losses_of(folder)
    best = min(losses, key=losses.get)
    shutil.rmtree(folder / f"checkpoint-{best}")
    (folder / "results.json").unlink()

    with pytest.raises(ValueError, match=rf"has lost checkpoint-{best}, that of its best evaluation"):
        run(recipe, "out", *PATIENT, resume=True)
