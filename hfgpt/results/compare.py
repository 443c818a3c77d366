"""Runs side by side: a table, a picture, and the options in which they differ.

Only what the runs measured is shown, with a warning where it does not compare.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from hfgpt.config.loading import flatten, load_config
from hfgpt.results.notebook import Comparison
from hfgpt.results.plots import FIGURE_DPI, add_perplexity_axis, encode_png, label_tokens, set_loss_range
from hfgpt.results.records import RESULTS_FILE, best_evaluation, comparable_lines, read_metrics, read_results
from hfgpt.system.console import align_columns
from hfgpt.system.storage import write_atomically

PICTURE_SIZE = (11.0, 5.6)
"""Width and height of the picture, in inches."""
MADE_BY = "hfgpt compare"
"""The `Software` of every picture; a file without it is never replaced."""
LOSS_OPTIONS = (
    *("data.source", "data.name", "data.files", "data.text_column", "data.split", "data.validation_files"),
    *("data.validation_split", "data.validation_fraction", "data.shuffle_documents", "data.packing"),
    *("data.streaming", "data.validation_documents", "train.final_eval_rows"),
    *("data.block_size", "tokenizer.name", "tokenizer.vocab_size", "init_from", "seed"),
)
"""Options that can change which text is scored, or what a token is; `seed`, because it shuffles the documents."""


def compare_runs(folders: Sequence[str | Path], picture: str | Path | None = None) -> Comparison:
    """Compare some runs, finished or not.

    Args:
        folders: what runs have left or are leaving; at least two.
        picture: the PNG to draw, or None. One that this has drawn before is replaced.

    Returns:
        `runs`, a list of what `summarize` says of each; `differing_options`, for each name the value of every run; and
        `warnings`, on what cannot be compared. A notebook shows it with the curves.

    Raises:
        ValueError: a folder holds no run, or one without an evaluation, or `picture` is another file.
    """
    if len(folders) < 2:
        raise ValueError(f"give at least two runs to compare, got {len(folders)}.")
    paths = [Path(folder) for folder in folders]
    if picture is not None:
        check_picture(Path(picture))
    names = short_names(paths)
    metrics = [read_run_metrics(path) for path in paths]
    results = [read_results(path / RESULTS_FILE) if (path / RESULTS_FILE).is_file() else {} for path in paths]
    runs = [summarize(*each) for each in zip(names, metrics, results, strict=True)]
    differing = differing_options([flatten(asdict(load_config(path / "run.yaml"))) for path in paths])
    warnings = [
        f"`{name}` differs: the losses may be of different text or different tokens, and then do not compare"
        for name in differing
        if name in LOSS_OPTIONS
    ]
    png = draw(runs, [comparable_lines(*each) for each in zip(metrics, results, strict=True)])
    if picture is not None:
        write_atomically(picture, png)
    found = {"runs": runs, "differing_options": differing, "warnings": warnings}
    return Comparison(found, render(found), png)


def short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' last names, with as many parent folders as it takes to tell them apart."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError("the same run is given twice.")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def read_run_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, at least one of them an evaluation."""
    path = folder / "metrics.jsonl"
    if not path.is_file() or not (folder / "run.yaml").is_file():
        raise ValueError(f"{folder} holds no run: it has no metrics.jsonl and run.yaml.")
    lines = read_metrics(path)
    if not any("val_loss" in line for line in lines):
        raise ValueError(f"the run in {folder} has not been evaluated yet. Wait for its first evaluation.")
    return lines


def summarize(name: str, metrics: list[dict[str, Any]], results: dict[str, Any]) -> dict[str, Any]:
    """What a run has come to: losses in nats per token, the median speed, and None for what only its end tells.

    Without results the numbers are those of the newest evaluation.
    """
    evaluations = [line for line in metrics if "val_loss" in line]
    last = results or evaluations[-1]
    best = best_evaluation(evaluations)
    speeds = [line["tokens_per_second"] for line in metrics if "tokens_per_second" in line]
    return {
        "name": name,
        "is_finished": bool(results),
        "step": max(line["step"] for line in metrics),
        "tokens": max(line["tokens"] for line in metrics),
        **{key: last[key] for key in ("train_loss", "val_loss", "val_perplexity")},
        "best_step": results.get("best_step", best["step"] if best else None),
        "parameters": results.get("parameters"),
        "tokens_per_second": float(np.median(speeds)) if speeds else None,
        "elapsed_seconds": results.get("elapsed_seconds"),
    }


def differing_options(options: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """For every option that is not the same in all runs, its values in their order; None where a run has none."""
    names = dict.fromkeys(name for each in options for name, value in each.items() if value != {})
    values = {name: [each.get(name) for each in options] for name in names if name != "output_dir"}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def render(comparison: dict[str, Any]) -> str:
    """The comparison as a table to read: a column for each run."""
    runs = comparison["runs"]
    rows = [
        ["", *(run["name"] for run in runs)],
        ["state", *("finished" if run["is_finished"] else "unfinished" for run in runs)],
    ]
    for label, key, form in [
        ("validation loss", "val_loss", ".4f"),
        ("perplexity", "val_perplexity", ",.2f"),
        ("training loss", "train_loss", ".4f"),
        ("gap", "gap", ".4f"),
        ("best step", "best_step", ",.0f"),
        ("steps", "step", ",.0f"),
        ("tokens", "tokens", ",.0f"),
        ("parameters", "parameters", ",.0f"),
        ("tokens/s", "tokens_per_second", ",.0f"),
        ("seconds", "elapsed_seconds", ",.0f"),
    ]:
        values = [{**run, "gap": run["val_loss"] - run["train_loss"]}[key] for run in runs]
        rows.append([label, *("-" if value is None else format(value, form) for value in values)])
    for name, values in comparison["differing_options"].items():
        rows.append([name, *(json.dumps(value, ensure_ascii=False) for value in values)])
    return align_columns(rows, numbers=True)


def check_picture(path: Path) -> None:
    """Refuse to write over a file that this has not drawn."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"the picture must be a .png, got {str(path)!r}.")
    if not path.exists():
        return
    try:
        with Image.open(path) as image:
            is_own = image.info.get("Software") == MADE_BY
    except OSError:
        is_own = False
    if not is_own:
        raise ValueError(f"{path} exists, and `hfgpt compare` has not drawn it. Name another with `--picture`.")


def draw(runs: Sequence[dict[str, Any]], metrics: Sequence[list[dict[str, Any]]]) -> bytes:
    """A PNG of the losses against tokens seen: the validation rows' on the left, the training rows' on the right.

    Both have the same axes, so that the gap of a run is the difference in height. A star marks its best evaluation.
    """
    figure = Figure(figsize=PICTURE_SIZE, dpi=FIGURE_DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, key, title in ((left, "val_loss", "validation loss"), (right, "train_loss", "training loss")):
        axes.set(title=title, xlabel="tokens seen")
        axes.grid(alpha=0.3)
        for index, (run, lines) in enumerate(zip(runs, metrics, strict=True)):
            draw_run(axes, run, lines, key, f"C{index % 10}")
    left.set_ylabel("loss (nats per token)")
    settled = [
        line[key]
        for lines in metrics
        for line in lines
        for key in ("val_loss", "train_loss")
        if key in line and line["tokens"] >= 0.02 * max(each["tokens"] for each in lines)
    ]
    set_loss_range(left, min(settled), max(settled))
    label_tokens(left, most=6)
    add_perplexity_axis(right)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2 if len(runs) < 5 else 3)
    return encode_png(figure, software=MADE_BY)


def draw_run(axes: Axes, run: dict[str, Any], lines: list[dict[str, Any]], key: str, color: str) -> None:
    """Draw one loss of one run: its evaluations, and on the training side, thin, the mean of the batches around."""
    evaluations = [line for line in lines if key in line]
    if key == "train_loss":
        batches = [line for line in lines if "loss" in line]
        width = max(1, len(batches) // 100)
        kernel = np.ones(width) / width
        if len(batches) >= width:
            smooth_tokens, smooth_losses = (
                np.convolve([line[name] for line in batches], kernel, "valid") for name in ("tokens", "loss")
            )
            axes.plot(smooth_tokens, smooth_losses, color=color, linewidth=0.7, alpha=0.45)
    label = f"{run['name']}: validation loss {run['val_loss']:.3f}, perplexity {run['val_perplexity']:,.1f}"
    label += "" if run["is_finished"] else " (unfinished)"
    tokens, losses = ([line[name] for line in evaluations] for name in ("tokens", key))
    axes.plot(tokens, losses, color=color, marker="o", markersize=3.5, label=label)
    best = [line for line in evaluations if line["step"] == run["best_step"]]
    if best and key == "val_loss":
        axes.plot(best[0]["tokens"], best[0][key], color=color, marker="*", markersize=13, linestyle="")
