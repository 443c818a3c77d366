"""What a run leaves: nothing torn, nothing untrue, nothing that names the machine; equal runs leave equal bytes."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hfgpt.results import plots, records
from hfgpt.results.plots import plot_losses
from hfgpt.results.records import MetricsLog, SamplesFile, read_metrics

SETTINGS = {"max_new_tokens": 80, "temperature": 0.8, "top_k": 50}


def training_line(step: int, loss: float) -> dict:
    return {"step": step, "loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": step * 64}


def evaluation_line(step: int, loss: float) -> dict:
    return {"step": step, "tokens": step * 64, "train_loss": loss, "val_loss": loss + 0.1}


def a_run(num_steps: int) -> list[dict]:
    """A loss that falls from about 8, evaluated at every tenth step."""
    lines = []
    for step in range(1, num_steps + 1):
        loss = 3 + 5 * math.exp(-step / 20)
        lines.append(training_line(step, loss))
        if step % 10 == 0:
            lines.append(evaluation_line(step, loss))
    return lines


# metrics.jsonl


def test_every_line_can_be_read_as_soon_as_it_is_written_and_stays_when_the_log_is_opened_again(tmp_path):
    written = a_run(20)

    for count, line in enumerate(written, start=1):
        log = MetricsLog(tmp_path / "metrics.jsonl")
        log.write(line)
        lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == written[:count]
    assert log.read() == read_metrics(tmp_path / "metrics.jsonl") == written


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_a_number_that_json_does_not_have_is_refused_with_its_name_and_step(tmp_path, number):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(training_line(1, 5.0))

    with pytest.raises(ValueError, match=r"`loss` is (nan|inf|-inf) at step 2"):
        log.write(training_line(2, number))

    assert [line["step"] for line in log.read()] == [1]


@pytest.mark.parametrize("step", [-1, 0, 10, 15, 40, 99])
def test_cutting_the_log_leaves_the_lines_up_to_a_step_byte_for_byte(tmp_path, step):
    log, expected = MetricsLog(tmp_path / "whole.jsonl"), MetricsLog(tmp_path / "expected.jsonl")
    for line in [evaluation_line(0, 8.0), *a_run(40)]:
        log.write(line)
        if line["step"] <= step:
            expected.write(line)

    log.truncate_after(step)

    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "expected.jsonl").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["expected.jsonl", "whole.jsonl"]


def test_a_log_torn_at_any_byte_is_read_and_goes_on(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.write({"step": step, "note": "größer"})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    second_line_ends = len(whole) * 2 // 3

    for end in range(second_line_ends, len(whole)):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:end])
        assert [line["step"] for line in log.read()] == [1, 2]
        log.truncate_after(2)
        log.write({"step": 3, "note": "größer"})
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')

    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is not JSON"):
        read_metrics(tmp_path / "metrics.jsonl")


# loss.png

TO_DRAW = {
    "a run": a_run(60),
    "no evaluation": [line for line in a_run(60) if "loss" in line],
    "only evaluations": [line for line in a_run(60) if "val_loss" in line],
    "one training line": [training_line(1, 8.3)],
    "before the first step": [evaluation_line(0, 8.3)],
    "diverging": [training_line(step, 10.0**step) for step in range(1, 6)],
    "standing still": [training_line(step, 0.0) for step in range(1, 6)],
}


@pytest.mark.parametrize("metrics", TO_DRAW.values(), ids=TO_DRAW.keys())
def test_losses_are_drawn_in_the_promised_size(tmp_path, metrics):
    plot_losses(metrics, tmp_path / "loss.png")

    width, height = (round(inches * plots.FIGURE_DPI) for inches in plots.FIGURE_SIZE)
    with Image.open(tmp_path / "loss.png") as image:
        image.load()
        assert image.size == (width, height)
        assert set(image.info) == {"dpi"}  # no date and no version


def test_the_same_losses_give_the_same_bytes_and_others_do_not(tmp_path):
    def drawn(metrics, baselines=None):
        plot_losses(metrics, tmp_path / "loss.png", baselines=baselines)
        return (tmp_path / "loss.png").read_bytes()

    otherwise_timed = [{**line, "tokens_per_second": line["step"]} for line in a_run(60)]
    with_one_loss_changed = [*a_run(60)[:-2], training_line(60, 3.5), a_run(60)[-1]]

    first = drawn(a_run(60))
    assert drawn(a_run(60)) == drawn(otherwise_timed) == first
    assert len({first, drawn(with_one_loss_changed), drawn(a_run(60), {"unigram": 600.0})}) == 3


def figure_drawn(monkeypatch, tmp_path, metrics, **options):
    """The figure that `plot_losses` made, as matplotlib holds it."""
    figures = []

    class Canvas(plots.FigureCanvasAgg):
        def __init__(self, figure):
            figures.append(figure)
            super().__init__(figure)

    monkeypatch.setattr(plots, "FigureCanvasAgg", Canvas)
    plot_losses(metrics, tmp_path / "loss.png", **options)
    return figures[0]


def test_lines_show_the_losses_that_were_logged(tmp_path, monkeypatch):
    metrics = a_run(60)

    figure = figure_drawn(monkeypatch, tmp_path, metrics, baselines={"unigram": 600.0, "bigram": 90.0})

    lines = {line.get_label(): line for line in figure.axes[0].lines}
    for label, key in [
        ("training batches", "loss"),
        ("evaluation on training rows", "train_loss"),
        ("evaluation on validation rows", "val_loss"),
    ]:
        expected = [(line["tokens"], line[key]) for line in metrics if key in line]
        np.testing.assert_array_equal(lines[label].get_xydata(), expected)
    assert lines["unigram (perplexity 600.0)"].get_ydata()[0] == pytest.approx(math.log(600))
    assert lines["bigram (perplexity 90.0)"].get_ydata()[0] == pytest.approx(math.log(90))


def test_the_best_evaluation_the_gap_and_the_loss_of_all_rows_are_marked(tmp_path, monkeypatch):
    options = {"best_step": 50, "final": ("all validation rows", 3.5)}

    axes = figure_drawn(monkeypatch, tmp_path, a_run(60), **options).axes[0]

    evaluations = {line["step"]: line for line in a_run(60) if "val_loss" in line}
    (star,) = [line for line in axes.lines if line.get_marker() == "*"]
    assert star.get_xydata().tolist() == [[50 * 64, evaluations[50]["val_loss"]]]
    assert star.get_label() == f"best: step 50, validation loss {evaluations[50]['val_loss']:.3f}"
    (diamond,) = [line for line in axes.lines if line.get_marker() == "D"]
    assert diamond.get_xydata().tolist() == [[60 * 64, 3.5]]
    (gap,) = axes.collections
    corners = {tuple(point) for point in gap.get_paths()[0].vertices.tolist()}
    assert corners >= {
        (64 * step, line[key]) for step, line in evaluations.items() for key in ("train_loss", "val_loss")
    }


def test_a_last_evaluation_of_more_rows_is_drawn_on_those_of_the_others():
    metrics = [*a_run(60), {"step": 60, "note": "not an evaluation"}]
    final = {"val_loss": metrics[-2]["val_loss"], "eval_rows_val_loss": 9.0, "eval_rows_train_loss": 8.0}

    shown = records.comparable_lines(metrics, final)

    assert shown == [*metrics[:-2], {**metrics[-2], "val_loss": 9.0, "train_loss": 8.0}, metrics[-1]]
    assert records.comparable_lines(metrics, {}) == metrics  # a run that is not finished
    earlier = {**final, "val_loss": 1.0}  # its last line is no evaluation of all rows
    assert records.comparable_lines(metrics, earlier) == metrics


def test_a_single_training_line_is_a_point(tmp_path, monkeypatch):
    figure = figure_drawn(monkeypatch, tmp_path, [training_line(1, 8.3)])

    assert figure.axes[0].lines[0].get_marker() == "."


def test_steps_and_perplexities_stand_beside_their_tokens_and_losses(tmp_path, monkeypatch):
    figure = figure_drawn(monkeypatch, tmp_path, a_run(60))

    top, right = figure.axes[0].child_axes
    steps = {float(label.get_text()): tick for tick, label in zip(top.get_xticks(), top.get_xticklabels(), strict=True)}
    assert {0, 20, 40, 60} <= set(steps)
    assert all(tick == step * 64 for step, tick in steps.items())
    ticks = zip(right.get_yticks(), right.get_yticklabels(), strict=True)
    perplexities = {float(label.get_text().replace(",", "")): tick for tick, label in ticks}
    assert len(perplexities) >= 3
    assert all(tick == pytest.approx(math.log(perplexity)) for perplexity, tick in perplexities.items())


def test_only_the_first_steps_may_leave_the_picture(tmp_path, monkeypatch):
    losses = {1: 1000.0, 2: 400.0, 50: 9.0, 99: 2.0}
    metrics = [training_line(step, losses.get(step, 3.0)) for step in range(1, 101)]

    low, high = figure_drawn(monkeypatch, tmp_path, metrics, baselines={"unigram": 600.0}).axes[0].get_ylim()

    assert low < 2.0
    assert 400.0 < high < 500.0  # step 2 is at 2 % of the run, step 1 before it
    low, high = figure_drawn(monkeypatch, tmp_path, metrics[2:], baselines={"unigram": 20_000.0}).axes[0].get_ylim()
    assert low < 2.0
    assert math.log(20_000) < high < 11


@pytest.mark.parametrize(("low", "high"), [(0, 11), (3, 6), (3.2, 3.9), (0, 0.05), (3, 3.002), (-0.4, 8.4), (1, 100)])
def test_perplexity_ticks_lie_in_the_picture_and_are_few(low, high):
    ticks = plots.perplexity_ticks(low, high)

    assert 3 <= len(ticks) <= 12
    assert all(low <= math.log(tick) + 1e-12 and math.log(tick) <= high + 1e-12 for tick in ticks)


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`metrics` \(0 lines\) holds neither"):
        plot_losses([], tmp_path / "loss.png")


# samples.md

TRICKY_TEXTS = [
    "The file object is",
    "",
    "ends in a newline\n",
    "``` a fence of three\n````\nand of four ```",
    "\n## step 1 (tokens 64, validation loss 1.0000)\n\n```text\nforged\n```\n",
    "line\r\nends\rof \u2028 every \x0b kind \x00, größer 🙂",
]


def write_samples(path: Path, steps, text: str = "sample") -> SamplesFile:
    samples = SamplesFile(path, "The", SETTINGS)
    for step in steps:
        samples.append(step, tokens=step * 2048, val_loss=4.0 - step / 1000, text=text)
    return samples


def test_samples_stand_below_their_prompt_settings_step_and_loss(tmp_path):
    write_samples(tmp_path / "samples.md", [100, 600], text="The file.")

    text = (tmp_path / "samples.md").read_text(encoding="utf-8")
    assert text.startswith("# Samples\n\nPrompt:\n\n```text\nThe\n```\n")
    assert "Decoding: max_new_tokens 80, temperature 0.8, top_k 50.\n" in text
    assert "\n## step 100 (tokens 204,800, validation loss 3.9000)\n\n```text\nThe file.\n```\n" in text
    assert text.index("## step 100 ") < text.index("## step 600 (tokens 1,228,800, validation loss 3.4000)")


@pytest.mark.parametrize("text", TRICKY_TEXTS)
def test_a_sample_stays_inside_its_fence(tmp_path, text):
    write_samples(tmp_path / "samples.md", [100], text=text)

    content = (tmp_path / "samples.md").read_bytes().decode()
    block = content.split("\n## step 100 ", 1)[1].split("\n\n", 1)[1]
    fence = block.partition("text\n")[0]
    assert block == f"{fence}text\n{text}\n{fence}\n"
    assert set(fence) == {"`"}
    assert len(fence) >= 3
    assert fence not in text


@pytest.mark.parametrize("text", TRICKY_TEXTS)
@pytest.mark.parametrize("step", [-1, 0, 150, 200, 300])
def test_cutting_samples_leaves_those_up_to_a_step_byte_for_byte(tmp_path, text, step):
    steps = [0, 100, 200, 300]
    write_samples(tmp_path / "expected.md", [s for s in steps if s <= step], text)

    write_samples(tmp_path / "samples.md", steps, text).truncate_after(step)

    assert (tmp_path / "samples.md").read_bytes() == (tmp_path / "expected.md").read_bytes()


@pytest.mark.parametrize("text", TRICKY_TEXTS)
def test_samples_torn_at_any_byte_go_on(tmp_path, text):
    write_samples(tmp_path / "samples.md", [100], text)
    first_sample_ends = (tmp_path / "samples.md").stat().st_size
    samples = write_samples(tmp_path / "samples.md", [200], text)
    whole = (tmp_path / "samples.md").read_bytes()

    for end in range(first_sample_ends, len(whole)):
        (tmp_path / "samples.md").write_bytes(whole[:end])
        samples.truncate_after(100)
        assert (tmp_path / "samples.md").read_bytes() == whole[:first_sample_ends]


@pytest.mark.parametrize(("prompt", "settings"), [("A", SETTINGS), ("The", {**SETTINGS, "temperature": 1.0})])
def test_samples_of_another_prompt_or_other_settings_are_not_mixed_in(tmp_path, prompt, settings):
    write_samples(tmp_path / "samples.md", [100])

    with pytest.raises(ValueError, match="another prompt or other settings"):
        SamplesFile(tmp_path / "samples.md", prompt, settings)
