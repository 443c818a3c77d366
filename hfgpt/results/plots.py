"""loss.png: the losses of a run against the tokens seen."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

from hfgpt.system.storage import write_atomically

FIGURE_SIZE = (9.0, 5.5)
"""Width and height of loss.png, in inches."""


FIGURE_DPI = 120


def plot_losses(
    metrics: list[dict[str, Any]],
    path: str | Path,
    *,
    baselines: Mapping[str, float] | None = None,
    best_step: int | None = None,
    final_val_loss: float | None = None,
) -> None:
    """Draw loss.png: training and evaluation losses against tokens seen. Equal input gives equal bytes.

    The axes show tokens (below), steps (above), loss in nats per token (left) and perplexity (right). What is
    higher than the rest in the first 2 % of the run is cut off, so that it does not squash the rest. Between the two
    evaluation losses lies, in grey, their gap.

    Args:
        metrics: training and evaluation lines of metrics.jsonl, in any mixture.
        path: the PNG file to write, `FIGURE_SIZE` times `FIGURE_DPI` pixels.
        baselines: perplexities to compare with, at least 1, by name; they become horizontal lines.
        best_step: of the evaluation to mark as the best.
        final_val_loss: of all validation rows, marked at the end; None if the evaluations score them all anyway.

    Raises:
        ValueError: `metrics` holds no loss.
    """
    training = [record for record in metrics if "loss" in record]
    evaluations = [record for record in metrics if "val_loss" in record]
    if not training and not evaluations:
        raise ValueError(f"`metrics` ({len(metrics)} lines) holds neither training nor evaluation lines to draw.")
    baseline_losses = {name: math.log(perplexity) for name, perplexity in (baselines or {}).items()}
    figure = Figure(figsize=FIGURE_SIZE, dpi=FIGURE_DPI, layout="constrained")
    axes = figure.add_subplot(
        title="Training and evaluation loss", xlabel="tokens seen", ylabel="loss (nats per token)"
    )
    last_tokens = max(record["tokens"] for record in training + evaluations)
    losses, settled_losses = list(baseline_losses.values()), list(baseline_losses.values())
    lone_marker = "." if len(training) == 1 else ""  # a line through one point is not to be seen
    curves: list[tuple[str, list[dict[str, Any]], str, dict[str, Any]]] = [
        ("training batches", training, "loss", {"color": "C0", "linewidth": 0.7, "alpha": 0.6, "marker": lone_marker}),
        ("evaluation on training rows", evaluations, "train_loss", {"color": "C0", "marker": "o", "markersize": 4}),
        ("evaluation on validation rows", evaluations, "val_loss", {"color": "C1", "marker": "o", "markersize": 4}),
    ]
    for label, records, key, style in curves:
        if records:
            axes.plot(
                [record["tokens"] for record in records], [record[key] for record in records], label=label, **style
            )
            losses += [record[key] for record in records]
            settled_losses += [record[key] for record in records if record["tokens"] >= 0.02 * last_tokens]
    tokens, validation = [record["tokens"] for record in evaluations], [record["val_loss"] for record in evaluations]
    axes.fill_between(
        tokens, [record["train_loss"] for record in evaluations], validation, color="0.5", alpha=0.15, linewidth=0
    )
    for record in evaluations:
        if record["step"] == best_step:
            label = f"best: step {best_step:,}, validation loss {record['val_loss']:.3f}"
            axes.plot(
                record["tokens"], record["val_loss"], label=label, linestyle="", marker="*", markersize=13, color="C1"
            )
            break
    if final_val_loss is not None:
        label = f"all validation rows: {final_val_loss:.3f}"
        axes.plot(tokens[-1], final_val_loss, label=label, linestyle="", marker="D", color="C1", markerfacecolor="none")
        losses.append(final_val_loss)
        settled_losses.append(final_val_loss)
    for index, (name, loss) in enumerate(baseline_losses.items()):
        label = f"{name} (perplexity {math.exp(loss):,.1f})"
        axes.axhline(loss, color="0.3", linewidth=1, linestyle=("--", ":", "-.")[index % 3], label=label)
    low, high = min(losses), max(settled_losses)
    margin = 0.05 * (high - low) or 0.1  # a single value needs a range around it
    axes.set_ylim(low - margin, high + margin)
    width = max(1, last_tokens)  # before the first step there are no tokens
    axes.set_xlim(-0.02 * width, 1.02 * width)
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    add_step_axis(axes, training + evaluations)
    add_perplexity_axis(axes)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})  # no version of matplotlib in the bytes
    write_atomically(path, buffer.getvalue())


def add_step_axis(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Label the top edge with steps, each above the tokens that had been seen by then."""
    steps, first = np.unique([0] + [record["step"] for record in records], return_index=True)
    tokens = np.array([0] + [record["tokens"] for record in records])[first]
    locator = MaxNLocator(steps=[1, 2, 5, 10], integer=True)
    ticks = [tick for tick in locator.tick_values(0, max(1, steps[-1])) if tick <= steps[-1]]
    top = axes.secondary_xaxis("top", xlabel="steps")
    top.set_xticks(np.interp(ticks, steps, tokens), [f"{tick:,.0f}" for tick in ticks])


def add_perplexity_axis(axes: Axes) -> None:
    """Label the right edge with round perplexities at the height of their loss, ln(perplexity)."""
    low, high = axes.get_ylim()
    right = axes.secondary_yaxis("right", ylabel="perplexity")
    ticks = perplexity_ticks(low, high)
    right.set_yticks(np.log(ticks), [f"{tick:,.10g}" for tick in ticks])


def perplexity_ticks(low: float, high: float) -> list[float]:
    """Round perplexities between exp(`low`) and exp(`high`), losses in nats per token; none where they lose meaning."""
    if high > 500:  # exp(709) is the largest that a float64 holds
        return []
    least, most = math.exp(max(low, 0)), math.exp(high)
    if most / least < 10:
        ticks = MaxNLocator(nbins=8, steps=[1, 2, 5, 10]).tick_values(least, most)
    else:
        subs = (1, 2, 5) if most / least < 1e4 else (1,)
        ticks = LogLocator(subs=subs, numticks=12).tick_values(least, most)
    return [float(tick) for tick in ticks if least <= tick <= most]
