"""The terminal: results alone go to stdout, messages for a person go to stderr.

While a command runs, whatever else is written to stdout comes out on stderr. Libraries print when they are imported,
while they work, from C, from child processes and at the end of the program; a result that a program reads must not be
mixed with that.
"""

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.table import Table

_reserved: TextIO | None = None
_show: Callable[[str], None] | None = None
"""What becomes of the lines of others, while something of ours is on the screen; see `route_lines`."""


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
    if accelerate is not None and not accelerate.PartialState().is_main_process:
        return
    if _show is not None:
        _show(text)
    else:
        Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(text)


@contextmanager
def route_lines(show: Callable[[str], None]) -> Iterator[None]:
    """Hand each line that others print to the terminal to `show`, while a bar or a text of ours is on it.

    Others are warnings, loggers that took their stream long before, and the bars of tqdm, of which the last state
    counts. What C code or another process writes is not seen here: taken at the file descriptor, the last words of a
    program that is aborted would be lost. Without a terminal nothing can be broken into, and nothing is done.
    """
    global _show
    streams = {unwrap(stream): LinesOfOthers(stream, show) for stream in (sys.stderr, sys.stdout) if is_shared(stream)}
    if not streams:
        yield
        return
    before = sys.stdout, sys.stderr, _show
    sys.stdout, sys.stderr = (streams.get(unwrap(stream), stream) for stream in (sys.stdout, sys.stderr))
    _show = show
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = [
        (handler, handler.stream)
        for logger in loggers
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and unwrap(handler.stream) in streams
    ]
    for handler, stream in handlers:
        handler.setStream(streams[unwrap(stream)])
    try:
        yield
    finally:
        for handler, stream in handlers:
            handler.setStream(stream)
        sys.stdout, sys.stderr, _show = before
        for lines in streams.values():
            lines.end()


def unwrap(stream: Any) -> Any:
    """The stream itself, where rich has put one of its own before it."""
    return getattr(stream, "rich_proxied_file", stream)


def is_shared(stream: TextIO) -> bool:
    """Whether others write to the terminal through this stream, and we do not."""
    return stream is not None and stream.isatty() and not (stream is sys.stdout and stream is result_stream())


class LinesOfOthers(FileProxy):
    """A stream that hands on whole lines, each as it stands after the last carriage return in it.

    For rich it is what rich itself would put here: its consoles find the terminal behind it, its bars leave it alone.
    """

    def __init__(self, stream: TextIO, show: Callable[[str], None]) -> None:
        super().__init__(Console(stderr=True), unwrap(stream))
        self.show: Callable[[str], None] | None = show
        self.process = os.getpid()
        self.rest = ""

    def write(self, text: str) -> int:
        """Take a text; in a process that was forked, and after the end, it goes straight to the terminal."""
        if self.show is None or os.getpid() != self.process:
            return self.rich_proxied_file.write(text)
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.show_line(line)
        return len(text)

    def show_line(self, line: str) -> None:
        """Show what a terminal would, if there is anything."""
        line = line.rstrip("\r").rpartition("\r")[2].rstrip()
        if self.show is not None and line:
            self.show(line)

    def end(self) -> None:
        """Show what has no line break yet, and stand aside."""
        self.show_line(self.rest)
        self.rest, self.show = "", None

    def flush(self) -> None:
        """Write out what has gone to the terminal itself; a line waits for its end."""
        self.rich_proxied_file.flush()


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
