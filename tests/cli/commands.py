"""Run the command line as a user types it."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from hfgpt.cli import main

RECIPE = """\
output_dir: out/accelerate
model: {n_positions: 64, n_embd: 32, n_layer: 2, n_head: 4, resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}
tokenizer: {vocab_size: 512}
data: {files: text.txt, block_size: 32}
optim: {learning_rate: 1.0e-2, warmup_steps: 2}
train: {max_steps: 6, batch_size: 4, eval_every: 3, eval_rows: 8, save_every: 3}
sample: {prompt: "The", max_new_tokens: 10}
"""


LOOPS = ["accelerate", "trainer"]


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code, and what it said."""

    code: int
    out: str
    err: str


def hfgpt(*words):
    """Run the command line in this process, in the current folder."""
    out, err = io.StringIO(), io.StringIO()
    AcceleratorState._reset_state(True)  # it holds for a process; other tests may have left another precision
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["hfgpt", *map(str, words)])
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")  # `main` sets it for good
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    return Result(code, out.getvalue(), err.getvalue())


def process(*words, folder):
    """Run a program in a process of its own."""
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False)


def shell(line, **environment):
    """Run a line of bash, in which `hfgpt` is the installed command."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", line], env={**os.environ, "PATH": path, **environment}, capture_output=True, check=False
    )


def contents(folder):
    """Every path below a folder, and what is in it."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


def unfinish(folder):
    """Make a run what it was when it was killed after its first checkpoint."""
    for name in ("results.json", "loss.png", "model.safetensors"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoint-6")


def assert_refused(said, *words):
    """Exit code 2, nothing on stdout, and one line on stderr: with the value that is wrong, and what to do."""
    assert (said.code, said.out) == (2, ""), said
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    for word in words:
        assert word in said.err
