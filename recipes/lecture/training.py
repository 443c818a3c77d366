"""The lecture's training loop: plain PyTorch, with a look at both losses and a sample of text as it goes.

hfgpt/training/loop.py is the loop for real runs. This one is for reading, and draws random numbers in the book's order.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn
from torch.utils.data import DataLoader

from hfgpt.config.schema import OptimConfig, TrainConfig
from hfgpt.data.loaders import collate
from hfgpt.data.prepare import Rows
from hfgpt.evaluation.loss import score_batches
from hfgpt.results.plots import encode_png
from hfgpt.system.storage import write_atomically
from hfgpt.training.checkpoint import TrainState


@dataclass(frozen=True)
class Loaders:
    """Micro-batches of both splits; the training rows are shuffled by torch's own random numbers."""

    train: DataLoader
    validation: DataLoader


def make_loaders(rows: Rows, batch_size: int) -> Loaders:
    """Lay out the micro-batches; a training batch that would not be full is left out.

    Raises:
        ValueError: there is no full training batch.
    """
    if len(rows.train) < batch_size:
        raise ValueError(
            f"the training text fills {len(rows.train)} rows, fewer than `train.batch_size` ({batch_size}). "
            "Give more text, or lower `data.block_size` or `train.batch_size`."
        )
    return Loaders(
        DataLoader(rows.train, batch_size, shuffle=True, drop_last=True, collate_fn=collate),
        DataLoader(rows.validation, batch_size, collate_fn=collate),
    )


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over every parameter, as in the book; hfgpt.training.optim spares norms and biases the weight decay."""
    first, second = optim.betas
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        trained, lr=optim.learning_rate, betas=(first, second), weight_decay=optim.weight_decay, fused=True
    )


def mean_loss(model: nn.Module, loader: Iterable, batches: int | None = None) -> float:
    """The loss over the first `batches` micro-batches, or over all: nats per token, dropout off."""
    return score_batches(model, islice(loader, batches)).loss


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loaders: Loaders,
    config: TrainConfig,
    write_sample: Callable[[], str],
    position: TrainState,
    epochs: int,
) -> tuple[list[dict[str, Any]], TrainState]:
    """Train for some epochs, and print what the book prints.

    Args:
        model: trained in place.
        optimizer: of the model's parameters.
        loaders: of both splits.
        config: `eval_every` steps there is an evaluation, on at most `eval_rows` rows of each split.
        write_sample: called after each epoch; returns what the model writes.
        position: where training stands.
        epochs: to train.

    Returns:
        A record of each evaluation (epoch, step, tokens, train_loss, val_loss) and of each sample (epoch, sample), and
        where training stands now.
    """
    records: list[dict[str, Any]] = []
    batches = config.eval_rows // config.batch_size or None
    for epoch in range(position.epoch + 1, position.epoch + epochs + 1):
        model.train()
        for batch in loaders.train:
            optimizer.zero_grad()
            loss = model(**batch, skip_logits=True).loss  # without ever holding all logits, see hfgpt/loss.py
            loss.backward()
            optimizer.step()

            step = position.step  # the book counts steps from 0
            position = replace(position, step=step + 1, tokens=position.tokens + batch["input_ids"].numel())
            if step % config.eval_every == 0:
                train_loss = mean_loss(model, loaders.train, batches)
                val_loss = mean_loss(model, loaders.validation, batches)
                print(f"Ep {epoch} (Step {step:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}", flush=True)
                tokens = position.tokens
                records.append(dict(epoch=epoch, step=step, tokens=tokens, train_loss=train_loss, val_loss=val_loss))
        position = replace(position, epoch=epoch)
        sample = write_sample()
        print(sample.replace("\n", " "), flush=True)
        records.append(dict(epoch=epoch, sample=sample))
    return records, position


def evaluations(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if "val_loss" in record]


def describe_overfitting(records: list[dict[str, Any]], training_text: str, prompt: str) -> str:
    """Say in a sentence what the two curves show, and how much of the last sample is the training text itself."""
    scored = evaluations(records)
    last, best = scored[-1], min(scored, key=lambda record: record["val_loss"])
    written = [record["sample"] for record in records if "sample" in record][-1].removeprefix(prompt)
    copied = difflib.SequenceMatcher(None, written, training_text, autojunk=False).find_longest_match().size
    ends = (
        f"at the end the training loss is {last['train_loss']:.3f} and the validation loss {last['val_loss']:.3f}, "
        f"which was at its best at step {best['step']} ({best['val_loss']:.3f})"
    )
    quote = f"of the {len(written)} characters written last, {copied} in a row stand so in the training text"
    if last["val_loss"] > last["train_loss"] + 1:
        return f"Overfitting: {ends}. The model learns the text by heart and no English: {quote}."
    return f"No overfitting yet: {ends}; {quote}."


def plot(curves: dict[str, list[dict[str, Any]]], path: Path, tokens_per_epoch: int) -> None:
    """Draw training and validation loss against epochs (below) and tokens seen (above), as the book does.

    Args:
        curves: the records of one or more runs, by name.
        path: the PNG file to write.
        tokens_per_epoch: tokens that one pass trains on.
    """
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="epochs", ylabel="loss (nats per token)")
    for number, (name, records) in enumerate(curves.items()):
        scored = evaluations(records)
        epochs = [record["tokens"] / tokens_per_epoch for record in scored]
        color = f"C{number}"
        axes.plot(epochs, [record["train_loss"] for record in scored], color=color, label=f"training, {name}")
        axes.plot(epochs, [record["val_loss"] for record in scored], "-.", color=color, label=f"validation, {name}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    above = axes.secondary_xaxis(
        "top",
        functions=(lambda epochs: epochs * tokens_per_epoch, lambda tokens: tokens / tokens_per_epoch),
        xlabel="tokens seen",
    )
    above.xaxis.set_major_formatter("{x:,.0f}")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG file; equal figures give equal bytes."""
    write_atomically(path, encode_png(figure))
