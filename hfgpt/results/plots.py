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

from hfgpt.system.fonts import fit_fonts
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
    final: tuple[str, float] | None = None,
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
        final: of which rows, and the validation loss at the end, which is marked; None if the evaluations are of the
            same rows.

    Raises:
        ValueError: `metrics` holds no loss.
    """
    training = [record for record in metrics if "loss" in record]
    evaluations = [record for record in metrics if "val_loss" in record]
    if not training and not evaluations:
        raise ValueError(f"`metrics` ({len(metrics)} lines) holds neither training nor evaluation lines to draw.")
    figure = Figure(figsize=FIGURE_SIZE, dpi=FIGURE_DPI, layout="constrained")
    axes = figure.add_subplot(
        title="Training and evaluation loss", xlabel="tokens seen", ylabel="loss (nats per token)"
    )
    points = draw_curves(axes, training, evaluations)
    last_tokens = max(tokens for tokens, _ in points)
    mark_best(axes, evaluations, best_step)
    if final is not None:
        scope, final_val_loss = final
        label = f"{scope}: {final_val_loss:.3f}"
        last_evaluation = evaluations[-1]["tokens"]
        axes.plot(
            last_evaluation, final_val_loss, label=label, linestyle="", marker="D", color="C1", markerfacecolor="none"
        )
        points.append((last_tokens, final_val_loss))
    for index, (name, perplexity) in enumerate((baselines or {}).items()):
        label, style = f"{name} (perplexity {perplexity:,.1f})", ("--", ":", "-.")[index % 3]
        axes.axhline(math.log(perplexity), color="0.3", linewidth=1, linestyle=style, label=label)
        points.append((last_tokens, math.log(perplexity)))
    low = min(loss for _, loss in points)
    set_loss_range(axes, low, max(loss for tokens, loss in points if tokens >= 0.02 * last_tokens))
    width = max(1, last_tokens)  # before the first step there are no tokens
    axes.set_xlim(-0.02 * width, 1.02 * width)
    label_tokens(axes)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    add_step_axis(axes, training + evaluations)
    add_perplexity_axis(axes)
    write_atomically(path, encode_png(figure))  # no version of matplotlib in the bytes


def draw_curves(
    axes: Axes, training: list[dict[str, Any]], evaluations: list[dict[str, Any]]
) -> list[tuple[int, float]]:
    """Draw the three losses, and the gap between those of the evaluations.

    Returns:
        Tokens and loss of each point drawn.
    """
    points = []
    lone_marker = "." if len(training) == 1 else ""  # a line through one point is not to be seen
    batches: dict[str, Any] = {"color": "C0", "linewidth": 0.7, "alpha": 0.6, "marker": lone_marker}
    evaluated: dict[str, Any] = {"marker": "o", "markersize": 4}
    for label, records, key, style in [
        ("training batches", training, "loss", batches),
        ("evaluation on training rows", evaluations, "train_loss", {"color": "C0", **evaluated}),
        ("evaluation on validation rows", evaluations, "val_loss", {"color": "C1", **evaluated}),
    ]:
        curve = [(record["tokens"], record[key]) for record in records]
        if curve:
            axes.plot(*zip(*curve, strict=True), label=label, **style)
        points += curve
    tokens, train_losses, val_losses = (
        [record[key] for record in evaluations] for key in ("tokens", "train_loss", "val_loss")
    )
    axes.fill_between(tokens, train_losses, val_losses, color="0.5", alpha=0.15, linewidth=0)
    return points


def mark_best(axes: Axes, evaluations: list[dict[str, Any]], best_step: int | None) -> None:
    """Draw a star at the evaluation of a step."""
    best = next((record for record in evaluations if record["step"] == best_step), None)
    if best is not None:
        label = f"best: step {best_step:,}, validation loss {best['val_loss']:.3f}"
        axes.plot(best["tokens"], best["val_loss"], label=label, linestyle="", marker="*", markersize=13, color="C1")


def set_loss_range(axes: Axes, low: float, high: float) -> None:
    """Show these losses and a little around them."""
    margin = 0.05 * (high - low) or 0.1  # a single value needs a range around it
    axes.set_ylim(low - margin, high + margin)


def label_tokens(axes: Axes, most: int = 10) -> None:
    """Label the lower edge with at most so many round numbers of tokens."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def encode_png(figure: Figure, software: str | None = None) -> bytes:
    """The PNG of a figure, its texts in fonts that have their characters; equal figures give equal bytes.

    `software` is what the picture says that it was made by, instead of a version of matplotlib.
    """
    fit_fonts(figure)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": software})
    return buffer.getvalue()


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
