"""Promises about the loss: which tokens it scores, and by how many it divides."""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from hfgpt.check.learning import (
    IGNORE_INDEX,
    ROUNDING,
    count_targets,
    learn,
    next_token_loss,
    ragged_labels,
    relative_distance,
    worst_tensor,
)
from hfgpt.check.promise import Finding, at_most, holds, not_applicable, promise
from hfgpt.check.subject import Subject

LOSS_ROUNDING = 1e-5
"""A cross-entropy in fp32 against one in fp64 of the same logits, relative to the loss: some 2^-24 a rounding, in sums
over a vocabulary and over the tokens."""


def relative_error(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / expected; infinite where `value` is no number."""
    error = float((value.detach().double() - expected.detach()).abs() / expected.detach().abs())
    return math.inf if math.isnan(error) else error


def follows_from(subject: Subject, *others: Callable[[Subject], Finding]) -> Finding | None:
    """That a promise need not be tried, where one on which it rests is broken; None if all `others` are kept."""
    for other in others:
        if other(subject).status == "fail":
            return not_applicable(f"it rests on {other.__name__.replace('_', '-')}, which is broken")
    return None


@promise(
    "training",
    meaning="The loss that `labels=input_ids` gives is not the cross-entropy of each next token.",
    usual_causes="`labels` shifted twice, or not at all; logits reshaped in another order than labels.",
)
def loss_is_next_token(subject: Subject) -> Finding:
    """The model's own loss is a cross-entropy, by hand and in fp64, of its own logits and the tokens after them."""
    model, ids = subject.make(), subject.ids(3, 20)
    parameters = inspect.signature(model.forward).parameters
    if "labels" not in parameters:
        return holds(False, "`forward` has no argument `labels`, by which Trainer finds what to hand over")
    output = model(input_ids=ids, labels=ids)
    if output.loss is None:
        return holds(False, "`forward` was given `labels` and returned no loss")
    expected = next_token_loss(output.logits, ids)
    return at_most(
        relative_error(output.loss, expected), LOSS_ROUNDING, f"loss {output.loss:.6f}, by hand {expected:.6f}"
    )


@promise(
    "training",
    meaning="Tokens labelled -100 (prompts, padding) are scored, or are counted where the loss divides.",
    usual_causes="`ignore_index` not passed on; a division by `labels.numel()`; a mean of each row's mean.",
)
def loss_ignores_minus_100(subject: Subject) -> Finding:
    """Rows with other numbers of targets, one of them with none, are scored as by hand."""
    if broken := follows_from(subject, loss_is_next_token):
        return broken
    model, ids = subject.make(), subject.ids(4, 20)
    labels = ragged_labels(ids)
    labels[2] = IGNORE_INDEX
    output = model(input_ids=ids, labels=labels)
    expected = next_token_loss(output.logits, labels)
    nothing = model(input_ids=ids, labels=torch.full_like(labels, IGNORE_INDEX)).loss
    note = f"loss {output.loss:.6f}, by hand {expected:.6f}; of a batch without any target: {float(nothing)}"
    return at_most(relative_error(output.loss, expected), LOSS_ROUNDING, note)


def takes_loss_arguments(subject: Subject) -> bool:
    """Whether Trainer hands `num_items_in_batch` to the model: by its attribute, or by `**kwargs` in `forward`."""
    model = subject.make()
    declared = getattr(model, "accepts_loss_kwargs", None)
    if declared is not None:
        return declared
    parameters = inspect.signature(model.forward).parameters.values()
    return any(each.kind is each.VAR_KEYWORD for each in parameters)


@promise(
    "training",
    meaning="Trainer tells the model how many targets the whole step has, and the model divides by another number: "
    "with gradient accumulation over N batches, loss and gradients come out up to N times too large.",
    usual_causes="`**kwargs` of `forward` not handed to the loss; `reduction='mean'` in every case.",
)
def loss_honours_num_items(subject: Subject) -> Finding:
    """The loss with `num_items_in_batch=N`, a number or a tensor, is the sum over the targets divided by N."""
    if broken := follows_from(subject, loss_is_next_token, loss_ignores_minus_100):
        return broken
    if not takes_loss_arguments(subject):
        return not_applicable("`forward` takes no `**kwargs`, so Trainer does not pass `num_items_in_batch`")
    model, ids = subject.make(), subject.ids(3, 20)
    labels = ragged_labels(ids)
    expected = next_token_loss(model(input_ids=ids).logits, labels) * count_targets(labels) / 100
    errors = []
    for number in (100, torch.tensor(100)):
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=number).loss
        errors.append(relative_error(loss, expected))
    empty = torch.full_like(labels, IGNORE_INDEX)
    nothing = float(model(input_ids=ids, labels=empty, num_items_in_batch=100).loss)
    if nothing != 0:
        return at_most(
            math.inf, LOSS_ROUNDING, f"a micro-batch without targets adds {nothing} to the step's loss, not 0"
        )
    return at_most(max(errors), LOSS_ROUNDING, f"loss {loss:.6f}, by hand {expected:.6f}")


@promise(
    "training",
    meaning="Labels that come shifted (context parallelism, padding-free collators) are shifted again, or dropped.",
    usual_causes="`**kwargs` of `forward` not handed to the loss; a loss of one's own that reads `labels` only.",
)
def loss_honours_shift_labels(subject: Subject) -> Finding:
    """`shift_labels` (B, T), where given, are what is scored, each by the logits of its own place."""
    if broken := follows_from(subject, loss_is_next_token, loss_ignores_minus_100):
        return broken
    model, ids = subject.make(), subject.ids(3, 20)
    parameters = inspect.signature(model.forward).parameters
    if "shift_labels" not in parameters and not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return not_applicable("`forward` takes neither `shift_labels` nor `**kwargs`")
    shifted = subject.ids(3, 20, seed=1)
    shifted[:, -3:] = IGNORE_INDEX
    output = model(input_ids=ids, labels=ids, shift_labels=shifted)
    scores, targets = output.logits.double().flatten(0, 1), shifted.flatten()
    expected = torch.nn.functional.cross_entropy(scores, targets, ignore_index=IGNORE_INDEX)
    return at_most(
        relative_error(output.loss, expected), LOSS_ROUNDING, f"loss {output.loss:.6f}, by hand {expected:.6f}"
    )


@promise(
    "training",
    meaning="A step of several micro-batches learns something else than the same step in one batch "
    "(huggingface/transformers#37766).",
    usual_causes="`forward` has no `**kwargs`, or does not use `num_items_in_batch`: each micro-batch counts the same, "
    "however many targets it has.",
)
def accumulation_is_one_batch(subject: Subject) -> Finding:
    """Gradients of micro-batches with unequal numbers of targets, scaled as Trainer does, add up to one batch's."""
    if broken := follows_from(subject, loss_is_next_token, loss_ignores_minus_100, loss_honours_num_items):
        return broken
    model, ids = subject.make(), subject.ids(4, 20)
    labels = ragged_labels(ids)
    targets = count_targets(labels)
    parts = [{"input_ids": ids[rows], "labels": labels[rows]} for rows in (slice(0, 1), slice(1, 2), slice(2, 4))]
    whole = learn(model, {"input_ids": ids, "labels": labels})
    if takes_loss_arguments(subject):
        added = learn(model, *({**part, "num_items_in_batch": torch.tensor(targets)} for part in parts))
    else:  # then Trainer divides by the number of micro-batches
        added = {name: gradient / len(parts) for name, gradient in learn(model, *parts).items()}
    return at_most(relative_distance(added, whole), ROUNDING, f"most in {worst_tensor(added, whole)}")
