"""The terminal: results alone go to stdout, messages for a person go to stderr.

While a command runs, whatever else is written to stdout comes out on stderr. Libraries print when they are imported,
while they work, from C, from child processes and at the end of the program; a result that a program reads must not be
mixed with that.
"""

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.table import Table

_reserved: TextIO | None = None


def result_stream() -> TextIO:
    """Where results are written: stdout, also while `reserve_stdout` keeps it from everything else."""
    return _reserved or sys.stdout


@contextmanager
def reserve_stdout() -> Iterator[None]:
    """Send what is written to stdout to stderr, except through `result_stream`.

    In a program, the file descriptor itself is taken, and is not given back, because libraries print until Python ends.
    Where a caller has replaced `sys.stdout`, only that object is taken, and it is given back at the end.
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
    """Print a message to stderr; of several processes only the main one does."""
    accelerate = sys.modules.get("accelerate")  # not imported: that takes seconds, and a process without it is alone
    if accelerate is None or accelerate.PartialState().is_main_process:
        Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(text)


def align_columns(rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Lines of text with the cells of each column below one another.

    Args:
        rows: all with as many cells.
        numbers: whether all columns but the first stand to the right.
    """
    table = Table.grid(padding=(0, 2))
    for column in range(len(rows[0])):
        table.add_column(justify="right" if numbers and column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=1_000_000, color_system=None, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(table, highlight=False)
    return "\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n"))
