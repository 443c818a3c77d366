"""Promises about transformers' Trainer: it takes the steps of a plain loop, and smooths the labels it should."""

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hfgpt.check.learning import (
    ROUNDING,
    next_token_loss,
    ragged_labels,
    relative_distance,
    set_dropout,
    worst_tensor,
)
from hfgpt.check.promise import Finding, at_most, promise
from hfgpt.check.promises.attention import two_passes
from hfgpt.check.promises.loss import (
    accumulation_is_one_batch,
    follows_from,
    loss_honours_num_items,
    loss_ignores_minus_100,
    loss_is_next_token,
)
from hfgpt.check.promises.training import training_is_repeatable
from hfgpt.check.subject import Subject

STEPS, MICRO_BATCHES, ROWS = 3, 2, 2
LEARNING_RATE = 0.1


@contextmanager
def quiet_trainer(model: PreTrainedModel, rows: list[dict[str, Any]], **changes: Any) -> Iterator[Trainer]:
    """A Trainer that walks `rows` in order by plain SGD on the CPU, and writes and prints nothing."""
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=MICRO_BATCHES,
            max_steps=STEPS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
            **changes,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        yield trainer


def ragged_rows(subject: Subject) -> list[dict[str, torch.Tensor]]:
    """Rows for `STEPS` steps, with other numbers of targets in each micro-batch."""
    ids = subject.ids(STEPS * MICRO_BATCHES * ROWS, 20)
    labels = torch.cat([ragged_labels(part) for part in ids.split(3)])
    return [{"input_ids": row, "labels": its_labels} for row, its_labels in zip(ids, labels, strict=True)]


def without_chance(model: PreTrainedModel, ids: torch.Tensor) -> PreTrainedModel:
    """The model in training mode, every dropout off; where one is not found, in eval mode for good."""
    if not torch.equal(*two_passes(set_dropout(model, 0).train(), ids)):
        model.eval()
        model.train = lambda mode=True: model  # Trainer would switch it on again
    return model


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def moved(model: torch.nn.Module, start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """How far each parameter went from `start`."""
    return {name: each.detach() - start[name] for name, each in model.named_parameters()}


def learn_plainly(model: PreTrainedModel, rows: list[dict[str, torch.Tensor]]) -> None:
    """What Trainer promises to do: SGD on the mean of each step's targets, here with the loss taken by hand."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    size = MICRO_BATCHES * ROWS
    for start in range(0, len(rows), size):
        ids = torch.stack([row["input_ids"] for row in rows[start : start + size]])
        labels = torch.stack([row["labels"] for row in rows[start : start + size]])
        next_token_loss(model(input_ids=ids, use_cache=False).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()


@promise(
    "training",
    meaning="transformers' Trainer, with gradient accumulation, takes other steps than a loop written by hand.",
    usual_causes="`forward` has `**kwargs`, and the loss does not use `num_items_in_batch` from them; "
    "a class whose `loss_type` is not ForCausalLM, for which Trainer counts each row's first token as a target; "
    "`accepts_loss_kwargs` set wrongly.",
)
def trainer_is_a_plain_loop(subject: Subject) -> Finding:
    """After three steps of two unequal micro-batches each, Trainer's weights are where SGD by hand leaves them."""
    if broken := follows_from(subject, loss_is_next_token, loss_ignores_minus_100, accumulation_is_one_batch):
        return broken
    if broken := follows_from(subject, loss_honours_num_items, training_is_repeatable):
        return broken
    rows = ragged_rows(subject)
    by_hand, model = (without_chance(subject.make(), subject.ids(2, 12)) for _ in range(2))
    start = weights_of(model)
    learn_plainly(by_hand, rows)
    with quiet_trainer(model, rows) as trainer:
        trainer.train()
    theirs, plain = moved(model, start), moved(by_hand, start)
    scale = sum(float((theirs[name] * plain[name]).sum()) for name in plain)
    scale /= sum(float(each.square().sum()) for each in plain.values())
    note = f"most in {worst_tensor(theirs, plain)}; Trainer went {scale:.3f} times as far; loss_type={model.loss_type}"
    return at_most(relative_distance(theirs, plain), STEPS * ROUNDING, note)


@promise(
    "training",
    meaning="With `label_smoothing_factor`, Trainer scores each token at its own place, not at the one before.",
    usual_causes="the class's name is not in transformers' MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, which "
    "`AutoModel.register` does not fill (huggingface/transformers#17960): enter it beside the class.",
)
def label_smoothing_scores_the_next_token(subject: Subject) -> Finding:
    """Trainer's smoothed loss is torch's smoothed cross-entropy of each next token."""
    model, ids = set_dropout(subject.make(), 0), subject.ids(3, 20)
    labels = ragged_labels(ids)
    with torch.no_grad(), quiet_trainer(model, [], label_smoothing_factor=0.1) as trainer:
        loss = float(trainer.compute_loss(model, {"input_ids": ids, "labels": labels}))
        logits = model(input_ids=ids).logits
    expected = float(next_token_loss(logits, labels, smoothing=0.1))
    note = f"loss {loss:.5f}, by hand {expected:.5f}"
    return at_most(abs(loss - expected) / expected, 1e-5, note)
