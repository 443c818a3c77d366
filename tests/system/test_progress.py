"""The line of a run: what it shows on a terminal of any width, and how long it says that the run takes."""

import os
import pty
import re
import subprocess
import sys
import termios
from contextlib import suppress

import pytest

from hfgpt.system import progress as progress_module
from hfgpt.system.progress import ProgressDisplay


@pytest.mark.parametrize("columns", [120, 80, 60, 40])
def test_on_a_terminal_of_any_width_the_line_keeps_step_bar_and_time_left(columns):
    program = """
from hfgpt.system.progress import ProgressDisplay

shown = ProgressDisplay(total_steps=12_000, first_step=0, rows_per_step=8, final_rows=4868)
for step in range(1, 4):
    shown.show_step(step, ["loss 2.134 nats/token", "84,210 tokens/s", "gradient norm 0.50", "lr 6.0e-04"])
shown.bar.refresh()
shown.begin_scoring(1000, 4868)
shown.bar.refresh()
shown.show_scored(1434)
shown.close()
"""
    frames = frames_on_a_terminal(program, columns)

    assert all(len(frame) <= columns for frame in frames)  # nothing is broken into two lines
    step = next(frame for frame in frames if frame.startswith("step 3/12000 ━━━━━"))
    assert re.search(r"━ [0-9, day]*\d:\d\d:\d\d left", step)
    assert ("loss 2.134 nats/token" in step) is (columns >= 60)
    assert (" tokens/s" in step) is (columns >= 120)
    scoring = next(frame for frame in frames if frame.startswith("scoring 1,434/4,868 ━"))
    assert re.search(r"━ \d:\d\d:\d\d left", scoring)


def frames_on_a_terminal(program, columns):
    """What a program shows on a real terminal of so many columns: every line that was drawn, without its colours."""
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, columns))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=child, stderr=child, env={**environment, "TERM": "xterm-256color"}
    ) as process:
        os.close(child)
        written = b""
        with suppress(OSError):  # how Linux says that the other side has closed
            while more := os.read(parent, 65536):
                written += more
    os.close(parent)
    assert process.returncode == 0, written.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def test_the_time_left_counts_the_scoring_at_the_end(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: now[0])
    shown = ProgressDisplay(total_steps=100, first_step=0, rows_per_step=8, final_rows=480)
    now[0] = 5.0  # checks before the first step
    shown.resume_steps()

    now[0] = 11.0
    shown.show_step(1, ["loss 2.1"])
    assert shown.seconds_left() == 99 * 6 + 480 * 6 / 8 / 3  # no evaluation was timed yet: a third of a step's time
    shown.begin_scoring(0, 20)
    now[0] = 13.0
    shown.show_scored(20)
    assert shown.seconds_left() == 99 * 8 + 480 * 2 / 20

    shown.begin_scoring(80, 480)  # of which a process before this one has done 80
    now[0] = 17.0
    shown.show_scored(120)
    assert shown.seconds_per_row == 4 / 40
    shown.close()


def test_without_a_terminal_a_long_scoring_says_now_and_then_how_far_it_is(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: now[0])
    shown = ProgressDisplay(total_steps=100, first_step=0)

    shown.begin_scoring(0, 1000)
    for rows in range(10, 1001, 10):
        now[0] += 1.0
        shown.show_scored(rows)
    shown.close()

    said = capsys.readouterr().err.splitlines()
    shown.begin_scoring(0, 1000)
    assert capsys.readouterr().err.splitlines() == ["scoring 0/1,000  rows of both splits  0:01:40 left"]
    shown.begin_scoring(0, 10)
    assert capsys.readouterr().err == ""  # it takes no time
    assert len(said) == 4
    assert said[0] == "scoring 210/1,000  rows of both splits  0:01:19 left"
