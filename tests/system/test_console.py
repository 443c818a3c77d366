"""Stdout holds results and nothing else, whatever is installed and however it prints."""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import warnings

import pytest
from rich.console import Console
from tqdm import tqdm
from typer.testing import CliRunner

from hfgpt.cli.app import app, print_result
from hfgpt.generation.render import stream_to
from hfgpt.system.console import print_status, reserve_stdout, result_stream, route_lines
from hfgpt.training.checkpoint import TrainState
from hfgpt.training.recorder import Recorder

TINY = """\
output_dir: out
model: {n_positions: 32, n_embd: 32, n_layer: 1, n_head: 2}
tokenizer: {vocab_size: 300}
data: {files: text.txt, block_size: 32}
train: {max_steps: 2, batch_size: 2, eval_every: 2, eval_rows: 2, save_every: 0}
optim: {warmup_steps: 1}
sample: {prompt: "The", max_new_tokens: 2}
"""

NOISE = """\
import atexit, ctypes, os, subprocess, sys, threading
import hfgpt.config.loading
load_config, libc, before = hfgpt.config.loading.load_config, ctypes.CDLL(None), sys.stdout

def noisy(*words):
    print("from Python")
    before.write("from an old handle\\n")
    os.write(1, b"from a descriptor\\n")
    libc.puts(b"from C")
    subprocess.run(["echo", "from a child"])
    atexit.register(print, "from the end")
    return load_config(*words)

hfgpt.config.loading.load_config = noisy
from hfgpt.cli import main
main()
"""
PLACES = ("Python", "an old handle", "a descriptor", "C", "a child", "the end")


def program(*words, folder, **environment):
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def world(tmp_path, lines):
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def test_whatever_a_library_prints_comes_out_on_stderr(world):
    ran = program("-c", NOISE, "config", "tiny.yaml", "--json", folder=world)

    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["config"]["output_dir"] == "out"
    assert ran.stdout.count("\n") == 1
    assert sorted(ran.stderr.splitlines()) == sorted(f"from {place}" for place in PLACES)


def test_deepspeed_which_prints_when_it_is_imported_leaves_one_object_on_stdout(world):
    cache = {"HF_DATASETS_CACHE": str(world / "cache")}
    importing = program("-c", "import deepspeed", folder=world)
    assert "deepspeed" in importing.stdout.lower() or "accelerator" in importing.stdout  # else nothing is tested here

    trained = program("-m", "hfgpt", "train", "tiny.yaml", "--json", folder=world, **cache)
    converted = program("-m", "hfgpt", "convert", "out", "gpt2", "--to", "gpt2", "--json", folder=world)

    for ran in (trained, converted):
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.count("\n") == 1
    assert json.loads(trained.stdout) == json.loads((world / "out/results.json").read_text())
    assert json.loads(converted.stdout)["steps_out"]
    assert "real_accelerator" in trained.stderr  # it was imported, and did talk


def test_of_several_processes_one_prints(world):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    words = [*launch, "-m", "hfgpt", "train", "tiny.yaml", "train.batch_size=1", "--json"]
    environment = {"ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(world / "cache")}

    fresh, finished = (program(*words, folder=world, **environment) for _ in range(2))

    assert (fresh.returncode, finished.returncode) == (0, 0), fresh.stderr + finished.stderr
    assert json.loads(fresh.stdout) == json.loads(finished.stdout)
    assert json.loads(fresh.stdout)["environment"]["processes"] == 2


def test_a_text_that_is_streamed_goes_to_stdout_as_it_comes(tmp_path):
    ran = program(
        "-c",
        "from hfgpt.system.console import *; from hfgpt.generation.render import open_console, stream_to\n"
        "with reserve_stdout():\n    stream_to(open_console(), 'a', iter(['b', 'ü']))\n    print('talk')",
        folder=tmp_path,
    )

    assert (ran.stdout, ran.stderr) == ("abü\n", "talk\n")


def test_a_stream_that_a_caller_puts_in_the_place_of_stdout_is_given_back():
    mine, errors = io.StringIO(), io.StringIO()

    with contextlib.redirect_stdout(mine), contextlib.redirect_stderr(errors):
        with reserve_stdout():
            print("talk")
            with reserve_stdout():  # a command that calls another
                print_result("result")
        print("after")
        assert result_stream() is mine

    assert (mine.getvalue(), errors.getvalue()) == ("result\nafter\n", "talk\n")


def test_what_typer_prints_of_itself_is_a_result():
    for words in (["train", "--help"], ["--help"], ["--version"]):
        assert CliRunner().invoke(app, words).stdout.strip()


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Where stderr can be sent, with a logger of a library that took the stream when it was imported."""
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    handler = logging.StreamHandler(terminal)
    logging.getLogger("a library").addHandler(handler)
    yield terminal
    logging.getLogger("a library").removeHandler(handler)


def talk():
    """What libraries do: a logger, a bar, a warning, a piece without a line break, and a status line of our own."""
    logging.getLogger("a library").warning("from a logger")
    for _ in tqdm(range(3), desc="from a bar", mininterval=0, ncols=60):
        pass
    sys.stderr.write(warnings.formatwarning("from a warning", UserWarning, "file.py", 1, line=""))
    print_status("from ourselves")
    sys.stderr.write("a piece")
    sys.stderr.flush()


SAID = ["from a logger", "from a bar: 100%", "file.py:1: UserWarning: from a warning", "from ourselves", "a piece"]


def test_the_lines_of_others_are_handed_over_whole_and_then_left_alone(terminal, monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal)  # here: pytest sets its own before each test
    shown = []

    with route_lines(shown.append):
        talk()

    assert len(shown) == len(SAID)
    assert all(line.startswith(said) for line, said in zip(shown, SAID, strict=True))
    assert terminal.getvalue() == ""
    assert sys.stderr is terminal
    talk()
    assert len(shown) == len(SAID)
    assert terminal.getvalue().startswith("from a logger\n\rfrom a bar:   0%")


def test_the_lines_of_others_stand_above_the_bar_of_a_run(terminal, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal)
    recorder = Recorder(tmp_path, total_steps=4, prompt="The", settings={}, start=TrainState())

    with route_lines(recorder.print_status):
        for step in range(1, 4):
            recorder.log_step(step=step, loss=2.1, grad_norm=0.5, learning_rate=6e-4, tokens=step)
        talk()
    recorder.close()

    # Before each of them the line of the bar is wiped; after each of them there is a line break.
    for said in SAID:
        before, after = terminal.getvalue().split(said)
        assert before.endswith("\x1b[2K")
        assert "\n" in after[:60]


def test_the_lines_of_others_come_after_a_text_that_is_streamed(terminal, monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal)  # here: pytest sets its own before each test

    def pieces():
        yield "quick "
        talk()
        yield "brown fox"

    screen = Terminal()
    stream_to(Console(file=screen, force_terminal=True), "The ", pieces())

    assert screen.getvalue() == "\x1b[1mThe \x1b[0mquick brown fox\n"
    assert [line.partition("|")[0] for line in terminal.getvalue().splitlines()] == SAID


def test_where_there_is_no_terminal_nothing_is_taken(capsys):
    shown = []

    with route_lines(shown.append):
        talk()

    assert not shown
    assert capsys.readouterr().err.endswith("from ourselves\na piece")


def test_a_process_that_was_forked_does_not_draw(terminal, monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal)
    with route_lines(lambda line: pytest.fail("the child drew")):
        process = os.getpid()
        try:
            sys.stderr.process = process + 1  # as a child sees it
            sys.stderr.write("from a child\n")
        finally:
            sys.stderr.process = process

    assert terminal.getvalue() == "from a child\n"
