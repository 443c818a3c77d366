"""What a run says at its end: nothing where all is well, and else what its numbers show and what to try."""

import math
import re

import pytest

from hfgpt.results.advice import advise

WELL = {
    "step": 100,
    "last_step": 100,
    "best_step": 100,
    "best_val_loss": 3.0,
    "train_loss": 2.9,
    "val_loss": 3.01,
    "val_perplexity": math.exp(3.01),
    "loss_gap": 0.11,
    "eval_rows_train_loss": 2.9,
    "eval_rows_val_loss": 3.0,
    "bigram_perplexity": 40.0,
    "validation_tokens": 50_000,
    "validation_rows": 400,
    "scored_validation_rows": 400,
    "skipped_steps": 0,
    "run": {"optim": {"name": "adamw", "learning_rate": 0.001}, "train": {"epochs": 3.0}},
}


def evaluations(*losses, last_step=100, train_losses=None):
    """Lines at equal distances up to the last step, the first one before training."""
    steps = [last_step * index // (len(losses) - 1) for index in range(len(losses))]
    return [
        {"step": step, "train_loss": train, "val_loss": loss}
        for step, train, loss in zip(steps, train_losses or losses, losses, strict=True)
    ]


LEARNT = evaluations(8.0, 4.0, 3.2, 3.01, 3.0)


def test_a_run_that_went_well_is_told_nothing():
    assert advise(WELL, LEARNT) == []
    assert (
        advise({**WELL, "step": 75, "best_step": 75, "last_step": 75}, evaluations(8, 4, 3.01, 3, last_step=75)) == []
    )


@pytest.mark.parametrize(
    ("changes", "lines", "said"),
    [
        # worse than counting pairs: has it learnt too little, or only its own text?
        (
            {"bigram_perplexity": 15.0},
            LEARNT,
            r"20.3 is no better than .*\(15.0\): it has learnt too little",
        ),
        (
            {"bigram_perplexity": 15.0, "train_loss": 2.0, "loss_gap": 0.1},
            LEARNT,
            r"no better than .* \(15.0\): .* does not hold for other text; it takes more text",
        ),
        # the gap, and whether the text was read more than once
        ({"loss_gap": 0.8}, LEARNT, r"0\.80 nats above the training loss, after 3\.0 passes over the text: more text"),
        (
            {"loss_gap": 0.8, "run": {"optim": {"name": "adamw", "learning_rate": 1e-3}, "train": {"epochs": 0.4}}},
            LEARNT,
            r"no text was read twice: the validation text is of another kind",
        ),
        (
            {
                "loss_gap": 0.8,
                "run": {"optim": {"name": "adamw", "learning_rate": 1e-3}, "train": {"epochs": None}},
            },  # a stream
            LEARNT,
            r"no text was read twice",
        ),
        # lowest before the end
        (
            {"best_step": 50, "best_val_loss": 2.9},
            evaluations(8.0, 3.5, 2.9, 2.95, 3.0, train_losses=[8.0, 3.5, 3.3, 3.0, 2.9]),
            r"lowest at step 50 of 100 \(2\.900, and 3\.000 at the end\): the model has begun to learn its text "
            r"by heart\. .*`train\.patience` stops in time",
        ),
        (
            {"best_step": 50, "best_val_loss": 2.9},
            evaluations(8.0, 3.5, 2.9, 2.95, 3.0, train_losses=[8.0, 3.5, 2.7, 2.8, 2.9]),
            r"the training loss has risen too: lower `optim\.learning_rate` \(0\.001\)",
        ),
        (
            {"best_step": 25, "best_val_loss": 2.9},
            evaluations(8.0, 2.9, 2.95, 2.97, 3.0, train_losses=[8.0, 3.5, 3.3, 3.0, 2.9]),
            r"from the first evaluation on: a smaller `train\.eval_every`",
        ),
        ({"step": 50, "best_step": 50, "best_val_loss": 3.0}, LEARNT, r"lowest at step 50 .*the folder holds those"),
        # still falling
        ({}, evaluations(8.0, 5.0, 4.0, 3.5, 3.0), r"still fell at the end \(3\.500 at step 75, 3\.000 at step 100\)"),
        # too little to score
        (
            {"validation_tokens": 625},
            LEARNT,
            r"625 tokens .* are few: .* uncertain by about 0\.10 nats.*hold more text out for validation",
        ),
        ({"scored_validation_rows": 5}, LEARNT, r"625 tokens .*raise `train\.final_eval_rows`"),
        ({"skipped_steps": 3}, LEARNT, r"3 of 100 steps were left out.*lower `optim\.learning_rate` \(0\.001\)"),
        ({"best_val_loss": 8.1}, LEARNT, r"no evaluation was better than the one before training \(8\.000\): lower"),
    ],
)
def test_what_is_odd_is_one_line_with_its_number_and_what_to_try(changes, lines, said):
    (text,) = advise({**WELL, **changes}, lines)

    assert re.search(said, text), text
    assert "\n" not in text


def test_a_stream_and_a_single_evaluation_are_judged_by_what_there_is():
    stream = {name: value for name, value in WELL.items() if name != "bigram_perplexity"}

    assert advise(stream, evaluations(8.0, 3.0)) == []
    assert advise(stream, evaluations(8.0, 3.0)[1:]) == []


def test_the_last_evaluation_is_compared_with_none_just_before_it():
    lines = [*evaluations(8.0, 5.0, 3.1), {"step": 100, "train_loss": 2.9, "val_loss": 3.0}]
    lines[2]["step"] = 99

    assert "5.000 at step 50" in advise(WELL, lines)[0]
