"""Stopping by a signal: it is noted, the step is finished, a checkpoint written, and the exit code is 75."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
"""What a service manager, a person and SLURM (`--signal=USR1@60`) send; not every system has all."""

RESUMABLE = 75
"""Exit code of a run that was stopped and can go on: EX_TEMPFAIL of sysexits.h, "try again later"."""


class Stopped(Exception):
    """A run has stopped because a signal asked it to; the message names where it goes on."""


class StopRequest:
    """Notes that the run was asked to stop, while it is entered.

    A second SIGINT, from a person who does not want to wait, is a KeyboardInterrupt as ever; the last checkpoint stays.
    Signals reach the main thread only: a run in another one, of a notebook's page or a server, leaves them alone.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        is_main = threading.current_thread() is threading.main_thread()
        for name in SIGNALS if is_main else ():
            number = getattr(signal, name, None)
            if number is not None:
                self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal, and let the next Ctrl-C through."""
        self.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def is_made(self) -> bool:
        """Whether any process was asked; all processes call it together and get the same answer."""
        process = PartialState()
        if process.num_processes == 1:
            return self.signal is not None
        return float(reduce(torch.tensor(float(self.signal is not None), device=process.device), "sum")) > 0
