"""The terminal: results alone go to stdout, what is said to a person goes to stderr.

While a command runs, whatever else is written to stdout comes out on stderr: libraries print when they are imported, at
work, from C and from child processes, and as the program ends, which would spoil a result that a program reads.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console

_reserved: TextIO | None = None


def result_stream() -> TextIO:
    """Where results are written: stdout, also while it is kept from everybody else."""
    return _reserved or sys.stdout


@contextmanager
def reserve_stdout() -> Iterator[None]:
    """Keep everybody from stdout who does not ask for `result_stream`.

    Of a program of its own the file descriptor is taken, and not given back: the last to talk do so when Python ends.
    Where a caller has put a stream of its own in the place of stdout, that one is taken, for as long as this lasts.
    """
    global _reserved
    if _reserved is not None:  # a command that calls another
        yield
        return
    taken = sys.stdout
    taken.flush()
    if taken is sys.__stdout__ and isinstance(taken, io.TextIOWrapper):
        _reserved = open(os.dup(taken.fileno()), "w", encoding=taken.encoding, errors=taken.errors)
        sys.stderr.flush()
        os.dup2(sys.stderr.fileno(), taken.fileno())
        taken.reconfigure(line_buffering=True)
        yield
        return
    _reserved, sys.stdout = taken, sys.stderr
    try:
        yield
    finally:
        _reserved, sys.stdout = None, taken


def print_status(text: str) -> None:
    """Tell the person at the terminal something, on stderr; of several processes the first one does."""
    accelerate = sys.modules.get("accelerate")  # importing it takes seconds, and a process without it is alone
    if accelerate is None or accelerate.PartialState().is_main_process:
        Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(text)
