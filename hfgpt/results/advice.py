"""What to try after a run: a line for each thing that its numbers show, and that a beginner would not see in them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDE_GAP = 0.3
"""Nats per token: new text is then a third more perplexing than the training text."""
STILL_FALLS = 0.02
"""Nats per token over the last tenth of the steps or more, so much that going on is worth its time."""
FEW_TOKENS = 2000
"""Losses of single tokens lie about 2.5 nats around their mean; that of so many is uncertain by 0.06."""


def advise(results: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a finished run shows, and what to try; nothing where all is well.

    Args:
        results: what results.json holds.
        evaluations: the lines of metrics.jsonl with a validation loss, all over the same rows, in nats per token.
    """
    trained = [line for line in evaluations if line["step"] > 0]
    start = next((line["val_loss"] for line in evaluations if line["step"] == 0), None)
    optim = results["run"]["optim"]
    rate = f"`optim.learning_rate` ({optim['learning_rate']:g})"
    if optim["name"] == "muon":
        rate += f" and `optim.muon_learning_rate` ({optim['muon_learning_rate']:g})"
    answers = [
        about_start(results, start, rate),
        about_turn(results, trained, rate),
        about_pairs(results, rate),
        about_gap(results),
        about_end(results, trained),
        about_validation_text(results),
        about_skipped_steps(results, rate),
    ]
    return [answer for answer in answers if answer is not None]


def about_start(results: Mapping[str, Any], start: float | None, rate: str) -> str | None:
    """Whether any evaluation was better than that before training."""
    if start is None or results["best_val_loss"] < start:
        return None
    return f"no evaluation was better than the one before training ({start:.3f}): lower {rate}"


def about_turn(results: Mapping[str, Any], trained: Sequence[Mapping[str, Any]], rate: str) -> str | None:
    """Whether the validation loss was lowest before the end, and why: what is learnt by heart lowers the other one."""
    best_step, last_step = results["best_step"], results["last_step"]
    if best_step == last_step:
        return None
    lowest = f"the validation loss was lowest at step {best_step} of {last_step} ({results['best_val_loss']:.3f}"
    if results["step"] < last_step:
        return f"{lowest}); the folder holds those weights"
    best = next(line for line in trained if line["step"] == best_step)
    if results["eval_rows_train_loss"] > best["train_loss"]:
        meaning = f"the training loss has risen too: lower {rate}"
    else:
        meaning = "the model has begun to learn its text by heart"
    if best_step == trained[0]["step"]:
        meaning += ", from the first evaluation on: a smaller `train.eval_every` shows where"
    return (
        f"{lowest}, and {results['eval_rows_val_loss']:.3f} at the end): {meaning}. The folder holds the last weights; "
        "`train.patience` stops in time and keeps the best"
    )


def about_pairs(results: Mapping[str, Any], rate: str) -> str | None:
    """Whether a table of pairs would have done as well; there is none of a stream."""
    bigram = results.get("bigram_perplexity")
    if bigram is None or results["val_perplexity"] < bigram:
        return None
    shows = (
        f"perplexity {results['val_perplexity']:.1f} is no better than that of counting which token follows which "
        f"({bigram:.1f}): "
    )
    if results["train_loss"] < math.log(bigram):
        return f"{shows}what it learns of its training text does not hold for other text; it takes more text"
    return f"{shows}it has learnt too little yet. Train longer, or with another {rate}"


def about_gap(results: Mapping[str, Any]) -> str | None:
    """Whether validation text is much harder than training text."""
    gap, epochs = results["loss_gap"], results["run"]["train"]["epochs"]
    if gap < WIDE_GAP:
        return None
    shows = f"the validation loss is {gap:.2f} nats above the training loss"
    if epochs is None or epochs <= 1:
        return f"{shows}, though no text was read twice: the validation text is of another kind than the training text"
    return (
        f"{shows}, after {epochs:.1f} passes over the text: more text, fewer steps, a smaller model or more dropout "
        "(`model.resid_pdrop`, `model.embd_pdrop`, `model.attn_pdrop`) narrow the gap"
    )


def about_end(results: Mapping[str, Any], trained: Sequence[Mapping[str, Any]]) -> str | None:
    """Whether the validation loss still fell when training ended."""
    last_step, loss = results["last_step"], results["eval_rows_val_loss"]
    before = next((line for line in reversed(trained) if line["step"] <= 0.9 * last_step), None)
    if before is None or results["best_step"] < last_step or before["val_loss"] - loss < STILL_FALLS:
        return None
    return (
        f"the validation loss still fell at the end ({before['val_loss']:.3f} at step {before['step']}, {loss:.3f} at "
        f"step {last_step}): more steps lower it further, in another `output_dir`"
    )


def about_validation_text(results: Mapping[str, Any]) -> str | None:
    """Whether the loss is one of too few tokens to tell two models apart."""
    rows, scored = results["validation_rows"], results["scored_validation_rows"]
    tokens = results["validation_tokens"] * scored // rows
    if tokens >= FEW_TOKENS:
        return None
    remedy = "raise `train.final_eval_rows`" if scored < rows else "hold more text out for validation"
    return (
        f"{tokens:,} tokens of validation text are few: its loss is uncertain by about {2.5 / math.sqrt(tokens):.2f} "
        f"nats, and smaller differences mean nothing; {remedy}"
    )


def about_skipped_steps(results: Mapping[str, Any], rate: str) -> str | None:
    """Whether steps were left out because their gradients were not finite."""
    count = results["skipped_steps"]
    if not count:
        return None
    return (
        f"{count} of {results['last_step']} steps were left out, their gradients were not finite: lower {rate}, or "
        "raise `optim.warmup_steps`"
    )
