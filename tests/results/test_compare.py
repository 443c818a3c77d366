"""Runs side by side: what the table and the picture show is what the runs wrote, and what does not compare is said."""

import json
import math

import numpy as np
import pytest
import yaml
from PIL import Image

from hfgpt.results import plots
from hfgpt.results.compare import check_picture, compare_runs, render, short_names


def make_run(folder, *, best=60, steps=100, speed=1000.0, finished=True, **options):
    """What a run leaves of itself: a validation loss that is lowest at step `best`."""
    folder.mkdir(parents=True)
    config = {"output_dir": str(folder), "data": {"files": "text.txt"}, "train": {"max_steps": steps}}
    for name, value in options.items():
        section, key = name.split("__")
        config.setdefault(section, {})[key] = value
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    lines = []
    for step in range(steps + 1):
        loss = 3 + 3 * math.exp(-step / 30)
        common = {"step": step, "tokens": 64 * step}
        if step:
            lines.append({**common, "loss": loss, "tokens_per_second": speed + step % 3})
        if step % 20 == 0:
            val_loss = 4 + abs(step - best) / 100
            lines.append({**common, "train_loss": loss, "val_loss": val_loss, "val_perplexity": math.exp(val_loss)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        results = {**lines[-1], "best_step": best, "parameters": 12_345, "elapsed_seconds": 61.5}
        (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        make_run(tmp_path / "small"),
        make_run(tmp_path / "wide", best=80, speed=500.0, finished=False, model__n_embd=96, optim__learning_rate=0.002),
    ]


def test_the_table_holds_what_the_runs_wrote(runs, tmp_path):
    comparison = compare_runs(runs, None)

    small, wide = comparison["runs"]
    assert (small["name"], small["is_finished"], small["best_step"], small["tokens"]) == ("small", True, 60, 6400)
    assert small["val_loss"] == pytest.approx(4.4)
    assert small["tokens_per_second"] == 1001
    assert (wide["is_finished"], wide["best_step"], wide["parameters"], wide["elapsed_seconds"]) == (
        False,
        80,
        None,
        None,
    )
    assert comparison["differing_options"] == {"model.hidden_size": [None, 96], "optim.learning_rate": [0.001, 0.002]}
    assert comparison["warnings"] == []
    lines = [line.split() for line in render(comparison).splitlines()]
    assert lines[0] == ["small", "wide"]
    assert ["validation", "loss", "4.4000", "4.2000"] in lines
    assert ["parameters", "12,345", "-"] in lines
    assert ["optim.learning_rate", "0.001", "0.002"] in lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "wide"]  # nothing was written


def test_losses_of_different_text_or_tokens_are_said_not_to_compare(tmp_path):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", tokenizer__vocab_size=8000)]

    (warning,) = compare_runs(runs, None)["warnings"]

    assert warning.startswith("`tokenizer.vocab_size` differs: the losses may be of")


def figure_drawn(monkeypatch, runs, path):
    figures = []

    class Canvas(plots.FigureCanvasAgg):
        def __init__(self, figure):
            figures.append(figure)
            super().__init__(figure)

    monkeypatch.setattr(plots, "FigureCanvasAgg", Canvas)
    compare_runs(runs, path)
    return figures[0]


def test_the_picture_shows_the_losses_of_every_run_against_its_tokens(runs, tmp_path, monkeypatch):
    figure = figure_drawn(monkeypatch, runs, tmp_path / "compare.png")

    left, right = figure.axes
    for axes, key in ((left, "val_loss"), (right, "train_loss")):
        curves = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
        for folder in runs:
            written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            expected = [(line["tokens"], line[key]) for line in written if key in line]
            (curve,) = [line for label, line in curves.items() if label.startswith(f"{folder.name}: ")]
            np.testing.assert_array_equal(curve.get_xydata(), expected)
    stars = [line for line in left.lines if line.get_marker() == "*"]
    assert [star.get_xdata()[0] for star in stars] == [60 * 64, 80 * 64]
    assert left.get_ylim() == right.get_ylim()
    assert [line.get_color() for line in stars] == ["C0", "C1"]


def test_a_picture_is_replaced_only_if_this_has_drawn_it(runs, tmp_path):
    path = tmp_path / "compare.png"
    compare_runs(runs, path)
    first = path.read_bytes()
    compare_runs(runs, path)
    assert path.read_bytes() == first

    for name, content in [("mine.png", b"not a picture"), ("photo.png", None)]:
        other = tmp_path / name
        if content is None:
            Image.new("RGB", (4, 4)).save(other)
        else:
            other.write_bytes(content)
        before = other.read_bytes()
        with pytest.raises(ValueError, match=r"exists, and `hfgpt compare` has not drawn it"):
            compare_runs(runs, other)
        assert other.read_bytes() == before
    with pytest.raises(ValueError, match=r"must be a \.png"):
        check_picture(tmp_path / "curves.pdf")


def test_names_are_as_long_as_it_takes_to_tell_runs_apart(tmp_path):
    paths = [tmp_path / "monday" / "run", tmp_path / "tuesday" / "run"]

    assert short_names(paths) == ["monday/run", "tuesday/run"]
    assert short_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


def test_what_is_no_run_or_has_nothing_to_compare_is_refused(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    young = make_run(tmp_path / "young", finished=False)
    lines = (young / "metrics.jsonl").read_text().splitlines(keepends=True)
    (young / "metrics.jsonl").write_text("".join(line for line in lines if "val_loss" not in line))

    for folders, message in [
        (runs[:1], "at least two runs"),
        ([runs[0], runs[0]], "given twice"),
        ([runs[0], tmp_path / "empty"], "holds no run"),
        ([runs[0], young], "has not been evaluated yet"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare_runs(folders, tmp_path / "compare.png")
        assert not (tmp_path / "compare.png").exists()
