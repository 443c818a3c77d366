"""How far a run is: a line at the foot of a terminal, or a line now and then where there is no terminal.

A run has two kinds of work that take time, steps and the scoring of rows; each is shown with its own bar and time left.
"""

import sys
import time
from collections.abc import Sequence
from datetime import timedelta

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import Progress, ProgressColumn, Task
from rich.progress_bar import ProgressBar
from rich.table import Table

LONGEST_BAR, SHORTEST_BAR = 15, 5
"""Columns of the bar where there is room, and where there is not."""

PLAIN_LINES = 40
"""About so many training lines are printed over a run where there is no terminal to draw a bar on."""

PLAIN_SECONDS = 20.0
"""Seconds between two lines about a scoring there."""

FORWARD_SHARE = 1 / 3
"""Of the time of a step, what its forward pass takes, about: a backward pass is two products where that is one."""

SCORED = ("rows of both splits",)


class ProgressLine:
    """One line of exactly the terminal's width: what is done, the bar and the time left always, and what else fits.

    Args:
        done: what is done, such as `step 12/400`.
        share: of the work that is done, in [0, 1].
        left: the time left.
        details: the most important first; those behind the first that does not fit are left out.
    """

    def __init__(self, done: str, share: float, left: str, details: Sequence[str]) -> None:
        self.done, self.share, self.left, self.details = done, share, left, details

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width - len(f"{self.done}  {self.left}")
        first = len(self.details[0]) + 2 if self.details else 0
        bar = min(LONGEST_BAR, max(min(room, SHORTEST_BAR), room - first))
        text = self.left
        for detail in self.details:
            if len(f"{text}  {detail}") > options.max_width - len(self.done) - bar - 2:
                break
            text += f"  {detail}"
        line = Table.grid(padding=(0, 1, 0, 0))
        for _ in range(3):
            line.add_column(no_wrap=True)
        line.add_row(self.done, ProgressBar(completed=self.share, total=1, width=max(0, bar)), text)
        yield line


class LineColumn(ProgressColumn):
    """The only column of the progress display."""

    def render(self, task: Task) -> ProgressLine:
        """The line of a task."""
        share = task.completed / task.total if task.total else 1.0
        return ProgressLine(task.description, share, task.fields["left"], task.fields["details"])


class ProgressDisplay:
    """Shows how far a run is, and estimates when it ends.

    Args:
        total_steps: of the whole run.
        first_step: steps that were done before.
        rows_per_step: over all processes.
        final_rows: that are scored after the last step, of both splits.
    """

    def __init__(self, total_steps: int, first_step: int, rows_per_step: int = 1, final_rows: int = 0) -> None:
        self.total_steps, self.first_step = total_steps, first_step
        self.rows_per_step, self.final_rows = rows_per_step, final_rows
        self.details: Sequence[str] = ()
        self.seconds_per_row: float | None = None  # of scoring; measured by the first evaluation
        self.step, self.began_at = first_step, time.perf_counter()
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
        self.bar = Progress(LineColumn(), console=self.console, disable=not sys.stderr.isatty(), transient=True)
        self.task = self.bar.add_task("", total=total_steps, left=duration(None), details=())
        self.resume_steps()
        self.bar.start()

    def show(
        self, done: str, completed: float, total: float, seconds_left: float | None, details: Sequence[str] = ()
    ) -> None:
        """Draw the line anew."""
        self.bar.update(
            self.task, description=done, completed=completed, total=total, left=duration(seconds_left), details=details
        )

    def resume_steps(self) -> None:
        """Show the steps again, and, if none is done yet, take their time from now on."""
        if self.step == self.first_step:
            self.began_at = time.perf_counter()
        self.show(
            f"step {self.step}/{self.total_steps}", self.step, self.total_steps, self.seconds_left(), self.details
        )

    def show_step(self, step: int, details: Sequence[str]) -> None:
        """Show that a step is done; the most important of `details` stands first."""
        self.step, self.details = step, details
        self.show(f"step {step}/{self.total_steps}", step, self.total_steps, self.seconds_left(), details)
        if self.bar.disable and step % max(1, self.total_steps // PLAIN_LINES) == 0:
            self.print("  ".join([f"step {step}/{self.total_steps}", *details, duration(self.seconds_left())]))

    def seconds_left(self) -> float | None:
        """Until the end of the run: the steps left, with the evaluations between them, and the scoring at the end."""
        if self.step == self.first_step:
            return None
        per_step = (time.perf_counter() - self.began_at) / (self.step - self.first_step)
        per_row = self.seconds_per_row
        if per_row is None:
            per_row = FORWARD_SHARE * per_step / self.rows_per_step
        return per_step * (self.total_steps - self.step) + per_row * self.final_rows

    def begin_scoring(self, done: int, total: int) -> None:
        """Begin to score rows, some of which may be done already, over all processes and of both splits."""
        self.scored_before, self.rows = done, total
        self.scoring_began_at = self.printed_at = time.perf_counter()
        left = None if self.seconds_per_row is None else self.seconds_per_row * (total - done)
        text = f"scoring {done:,}/{total:,}"
        self.show(text, done, total, left, SCORED)
        if self.bar.disable and left is not None and left > PLAIN_SECONDS:
            self.print("  ".join([text, *SCORED, duration(left)]))

    def show_scored(self, done: int) -> None:
        """Show that so many rows are scored."""
        now = time.perf_counter()
        self.seconds_per_row = (now - self.scoring_began_at) / max(1, done - self.scored_before)
        text, left = f"scoring {done:,}/{self.rows:,}", self.seconds_per_row * (self.rows - done)
        self.show(text, done, self.rows, left, SCORED)
        if self.bar.disable and now - self.printed_at > PLAIN_SECONDS:
            self.printed_at = now
            self.print("  ".join([text, *SCORED, duration(left)]))

    def print(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self.console.print(text)

    def close(self) -> None:
        """Take the bar away."""
        self.bar.stop()


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds; dashes while they are not known."""
    return f"{'-:--:--' if seconds is None else timedelta(seconds=round(seconds))} left"
