"""The prompt loop: in a pipe, and at a real pseudo-terminal with its Ctrl-C and Ctrl-D."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hfgpt.generation.generator import continue_text, load_generator
from hfgpt.generation.params import SamplingParams
from hfgpt.generation.play import play


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("played")
    config = GPT2Config(vocab_size=320, n_positions=900, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # with `seed=12` its text is 800 tokens long; others end early
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def generator(folder):
    return load_generator(folder)


@pytest.fixture
def say(generator, monkeypatch, capsys):
    """A function that plays with lines from a pipe; returns what came to stdout and stderr."""

    def say(*lines, **given):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        play(generator, SamplingParams(**given))
        return capsys.readouterr()

    return say


def text_of(generator, prompt, **settings):
    return prompt + "".join(continue_text(generator, prompt, SamplingParams(**settings))) + "\n"


def test_each_line_is_continued_and_settings_last(say, generator):
    settings = {"max_new_tokens": 9, "temperature": 0.5, "seed": 3}

    said = say("The 한국", "/set temperature=0.5,seed=3", "", "The 한국", "/again", "//x", max_new_tokens=9, seed=1)

    expected = [("The 한국", {"max_new_tokens": 9, "seed": 1}), *[("The 한국", settings)] * 2, ("/x", settings)]
    assert said.out == "".join(text_of(generator, prompt, **each) for prompt, each in expected)
    assert said.err == ""


def test_settings_are_shown_as_they_are_typed_and_can_be_set_back(say):
    said = say("/set num_beams=2,stop=\\n,stop=a b", "/settings", "/reset", "/settings", "/quit", "never read", seed=4)

    first, second = said.err.splitlines()
    assert "num_beams=2" in first
    assert "stop=\\n,stop=a b,seed=4" in first
    assert "early_stopping=false" in first
    assert "num_beams=1" in second
    assert "stop=" not in second
    assert said.out == ""


def test_what_is_shown_can_be_typed_again(say):
    shown = say("/set stop=a, b,stop=c=d,seed=4,top_k=3", "/settings").err.strip()

    assert (
        say(
            f"/set {shown.replace(',num_beams=1,length_penalty=1.0,early_stopping=false', '')}", "/settings"
        ).err.strip()
        == shown
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temprature=1", "Did you mean `temperature`?"),
        ("/set length_penalty=2", "`length_penalty` has no effect without beam search"),
        ("/dance", "/dance is no command here"),
        ("/again", "nothing for it to do"),
        ("x" * 900, "are together longer than the model's"),
    ],
)
def test_a_mistake_in_a_pipe_ends_the_loop(say, line, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        say(line, "The")


class Terminal:
    """A pseudo-terminal with the command in it."""

    def __init__(self, *words):
        self.fd, other = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "PYTHONUTF8": "1", "COLUMNS": "80"}
        command = [sys.executable, "-m", "hfgpt", *words]
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True, close_fds=True
        )
        os.close(other)
        self.seen = ""

    def wait_for(self, pattern, seconds=60):
        """Read until a pattern is there; what was read up to it is forgotten."""
        ends_at = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen, flags=re.DOTALL)):
            assert time.monotonic() < ends_at, f"no {pattern!r} in {self.seen[-2000:]!r}"
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
        before, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return before

    def type(self, text):
        os.write(self.fd, text.encode())


def test_at_a_terminal_mistakes_are_told_ctrl_c_stops_a_text_and_ctrl_d_leaves(folder):
    terminal = Terminal(
        "play", folder, "--set", "max_new_tokens=800,temperature=1,top_k=0,seed=12,repetition_penalty=1.5"
    )
    try:
        terminal.wait_for(r"is ready.*> ")
        terminal.type("/set temprature=1\n")
        terminal.wait_for(r"error: `temprature` is no setting\. Did you mean `temperature`\?.*> ")
        terminal.type("한국 The\n")
        terminal.wait_for("\x1b\\[1m한국 The\x1b\\[0m.{20}")  # it streams: this is long before 800 tokens
        os.killpg(terminal.process.pid, signal.SIGINT)  # what the terminal does on Ctrl-C
        terminal.wait_for(r"\(stopped\)\r\n.*> ")
        terminal.type("/set max_new_tokens=3\n/again\n")
        terminal.wait_for("\x1b\\[1m한국 The\x1b\\[0m.*> ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.fd)
