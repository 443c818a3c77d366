"""What a run says: on the terminal and in its files."""

import json

import pytest

from hfgpt.training import recorder as recorder_module
from hfgpt.training.checkpoint import TrainState
from hfgpt.training.recorder import Recorder

SETTINGS = {"max_new_tokens": 5, "temperature": 0.8, "top_k": 50}


@pytest.fixture
def recorder(tmp_path):
    made = Recorder(tmp_path, total_steps=100, prompt="The", settings=SETTINGS, start=TrainState())
    yield made
    made.close()


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_training_line_holds_what_was_measured(recorder, tmp_path):
    recorder.log_step(step=1, loss=2.5, grad_norm=0.5, learning_rate=1e-3, tokens=640)

    (line,) = lines(tmp_path)
    speed, seconds = line.pop("tokens_per_second"), line.pop("elapsed_seconds")
    assert line == {"step": 1, "loss": 2.5, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens": 640}
    assert speed > 0
    assert 0 < seconds < 60


def test_the_time_of_a_run_is_that_of_all_its_processes(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(recorder_module.time, "perf_counter", lambda: now[0])

    def recorder(step, started_at):
        return Recorder(tmp_path, 100, "The", SETTINGS, TrainState(step=step, tokens=step), started_at)

    first = recorder(0, started_at=90.0)
    for second in (105.0, 110.0, 140.0):  # the last of them is killed before there is a checkpoint of it
        now[0] = second
        first.log_step(step=int(second - 100) // 5, loss=2.5, grad_norm=1.0, learning_rate=0.1, tokens=int(second))
    first.close()
    now[0] = 5.0  # another process, another clock
    second = recorder(2, started_at=3.0)
    now[0] = 10.0
    second.log_step(step=3, loss=2.5, grad_norm=1.0, learning_rate=0.1, tokens=300)
    second.close()

    assert [line["elapsed_seconds"] for line in lines(tmp_path)] == [15.0, 20.0, 27.0]
    assert second.elapsed_seconds() == 27.0


def test_time_spent_on_evaluation_is_no_training_time(recorder, tmp_path, monkeypatch):
    now = [11.0]
    recorder.started_at = 10.0
    monkeypatch.setattr(recorder_module.time, "perf_counter", lambda: now[0])

    recorder.pause()
    now[0] = 111.0
    recorder.resume()
    now[0] = 112.0
    recorder.log_step(step=1, loss=2.5, grad_norm=0.5, learning_rate=1e-3, tokens=640)

    assert lines(tmp_path)[0]["tokens_per_second"] == pytest.approx(640 / 2)


def test_a_norm_that_overflowed_in_fp16_is_left_out(recorder, tmp_path):
    recorder.log_step(step=1, loss=2.5, grad_norm=float("inf"), learning_rate=1e-3, tokens=640)

    assert "grad_norm" not in lines(tmp_path)[0]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_run_that_diverged_stops_and_says_what_to_do(recorder, tmp_path, loss):
    with pytest.raises(FloatingPointError, match=r"at step 7: training diverged\. Lower `optim\.learning_rate`"):
        recorder.log_step(step=7, loss=loss, grad_norm=1.0, learning_rate=1e-3, tokens=640)

    assert lines(tmp_path) == []


def test_a_resumed_run_drops_the_lines_it_will_write_again(recorder, tmp_path):
    for step in range(1, 6):
        recorder.log_step(step=step, loss=2.5, grad_norm=0.5, learning_rate=1e-3, tokens=step * 10)
    recorder.log_evaluation(
        {"step": 5, "tokens": 50, "train_loss": 2.0, "val_loss": 2.0, "val_perplexity": 7.4}, "The end."
    )

    Recorder(tmp_path, total_steps=100, prompt="The", settings=SETTINGS, start=TrainState(step=3, tokens=30)).close()

    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert "The end." not in (tmp_path / "samples.md").read_text()


def test_without_a_terminal_there_are_plain_lines_and_no_bar(recorder, capsys, monkeypatch):
    for step in range(1, 101):
        recorder.log_step(step=step, loss=2.134, grad_norm=0.5, learning_rate=6e-4, tokens=step * 10)

    said = capsys.readouterr().err.splitlines()
    assert 20 <= len(said) <= 60
    assert said[-1].startswith("step 100/100  loss 2.134 nats/token  ")
    assert "\x1b" not in "".join(said)
