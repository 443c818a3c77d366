"""What a run leaves to be read: metrics.jsonl, results.json, loss.png, samples.md. No numbers are computed here.

Only the main process writes. Files are either appended to, a whole line or section at a time, or replaced at once,
so a killed run leaves at most one torn end, which `truncate_after` takes away when the run goes on.
"""

import io
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

from hfgpt.system.storage import encode_json, write_atomically

RESULTS_FILE, PLOT_FILE = "results.json", "loss.png"


FIGURE_SIZE = (9.0, 5.5)
"""Width and height of loss.png, in inches."""
FIGURE_DPI = 120

# One sample in samples.md, as `SamplesFile.append` writes it. Its text holds no run of backticks as long as its fence.
SAMPLE_SECTION = re.compile(r"\n## step (\d+) \([^\n]*\)\n\n(`{3,})text\n(.*?)\n\2\n", re.DOTALL)


class MetricsLog:
    """metrics.jsonl: one JSON object a line, appended as the run goes; created empty if there is none.

    A run that is resumed calls `truncate_after(step of the checkpoint)` before it writes, one that starts anew
    `truncate_after(-1)`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.touch()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line and hand it to the operating system.

        Args:
            record: has `step`; every number is finite.

        Raises:
            ValueError: a number is NaN or infinite. JSON cannot say so, and null would not be true.
        """
        line = encode_json(record, f"at step {record['step']}") + b"\n"
        with self.path.open("ab") as file:
            file.write(line)

    def read(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps than `step`, and a last line that a kill tore."""
        lines = complete_lines(self.path)
        kept = [line + b"\n" for line, record in zip(lines, self.read(), strict=True) if record["step"] <= step]
        write_atomically(self.path, b"".join(kept))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in the order written, without a last line that is torn or still being written.

    Raises:
        ValueError: another line is not JSON.
    """
    records = []
    for number, line in enumerate(complete_lines(path), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}. Delete it to read the rest.") from error
    return records


def complete_lines(path: str | Path) -> list[bytes]:
    """Lines that end in a newline, without it."""
    return Path(path).read_bytes().split(b"\n")[:-1]


def training_speed(metrics: list[dict[str, Any]]) -> float | None:
    """Tokens per second over all training lines of metrics.jsonl, evaluations and checkpoints left out."""
    training = [record for record in metrics if "tokens_per_second" in record]
    tokens = [0, *(record["tokens"] for record in training)]
    seconds = sum(
        (after - before) / record["tokens_per_second"]
        for before, after, record in zip(tokens[:-1], tokens[1:], training, strict=True)
    )
    return tokens[-1] / seconds if training else None


class SamplesFile:
    """samples.md: what the model wrote at each evaluation, below the prompt and the settings of decoding.

    Created with its header if there is none. When a run goes on or starts anew, call `truncate_after` as for
    `MetricsLog`.

    Args:
        path: the file.
        prompt: text that every sample continues.
        settings: how samples are drawn, by name: `max_new_tokens`, `temperature`, `top_k` ...

    Raises:
        ValueError: the file is there and has another prompt or other settings.
    """

    def __init__(self, path: str | Path, prompt: str, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        decoding = ", ".join(f"{name} {value}" for name, value in settings.items())
        self.header = f"# Samples\n\nPrompt:\n\n{fenced(prompt)}\nDecoding: {decoding}.\n"
        if not self.path.exists():
            write_atomically(self.path, self.header.encode())
        elif not self.path.read_bytes().startswith(self.header.encode()):
            raise ValueError(
                f"{self.path} holds samples of another prompt or other settings than {decoding!r}. Move it away, or "
                "use another `output_dir`."
            )

    def append(self, step: int, tokens: int, val_loss: float, text: str) -> None:
        """Add the sample of one evaluation.

        Args:
            step: optimizer step of the evaluation.
            tokens: tokens seen until then.
            val_loss: nats per token.
            text: what was written, in full.
        """
        section = f"\n## step {step} (tokens {tokens:,}, validation loss {val_loss:.4f})\n\n{fenced(text)}"
        with self.path.open("ab") as file:
            file.write(section.encode())

    def read(self) -> list[tuple[int, str]]:
        """Step and text of every sample, in the order written."""
        content, position, samples = self.path.read_bytes().decode(), len(self.header), []
        while section := SAMPLE_SECTION.match(content, position):
            position = section.end()
            samples.append((int(section[1]), section[3]))
        return samples

    def truncate_after(self, step: int) -> None:
        """Drop the samples of later steps than `step`, and a last one that a kill tore."""
        content = self.path.read_bytes().decode(errors="replace")  # only a torn end can be no UTF-8, and it is dropped
        kept, position = [self.header], len(self.header)
        # One after the other: what looks like a heading inside a sample is never found.
        while section := SAMPLE_SECTION.match(content, position):
            position = section.end()
            if int(section[1]) <= step:
                kept.append(section[0])
        write_atomically(self.path, "".join(kept).encode())


def fenced(text: str) -> str:
    """`text` as a Markdown code block, whose fence is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}\n"


def comparable_lines(metrics: list[dict[str, Any]], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, with the last evaluation on the rows of all others, where it scored more.

    Args:
        metrics: of a finished run.
        results: of the same run, what results.json holds.
    """
    index = max((i for i, line in enumerate(metrics) if "val_loss" in line), default=None)
    if index is None or metrics[index]["val_loss"] != results.get("val_loss") or "eval_rows_val_loss" not in results:
        return metrics
    losses = {name: results[f"eval_rows_{name}"] for name in ("train_loss", "val_loss")}
    return [*metrics[:index], {**metrics[index], **losses}, *metrics[index + 1 :]]


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
