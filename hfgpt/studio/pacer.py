"""The clock of a worker: it lets steps begin when the driver says so, and measures them in turns.

A worker calls `pace()` before each step. The first call says that the worker is ready. From then on every turn is asked
for by the driver, one JSON line each, and answered by one.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch


class Done(Exception):
    """The driver wants no more steps."""


class Pacer:
    """See the module.

    Args:
        requests: the driver's lines.
        replies: where the answers go.
        is_gpu: whether steps run on a GPU. It is waited for then, its cached memory is given back after each turn, so
            that the others have it, and the first step of a turn, which asks for it again, does not count.

    Attributes:
        costs: of a step, which the worker fills in: `units` and their name, `unit`, `flops`, `bytes`.
    """

    def __init__(self, requests: TextIO, replies: TextIO, is_gpu: bool) -> None:
        self.requests, self.replies, self.is_gpu = requests, replies, is_gpu
        self.costs: dict[str, Any] = {}
        self.resident = resident_bytes()
        self.turns = self.take_turns()

    def __call__(self) -> None:
        """Return when the next step may begin.

        Raises:
            Done: none may.
        """
        next(self.turns)

    def take_turns(self) -> Iterator[None]:
        """Stand still at a `yield` for each step that may be taken."""
        self.rest()
        forget_peak(self.is_gpu)
        self.reply({"ready": True, **self.costs})
        while request := json.loads(self.requests.readline() or "{}"):
            if self.is_gpu:
                yield
            self.wait()
            started = read_clocks()
            for _ in range(request["steps"]):
                yield
            self.wait()
            taken = [after - before for before, after in zip(started, read_clocks(), strict=True)]
            self.rest()
            wall, cpu, machine = taken
            self.reply({"seconds": wall, "cpu_seconds": cpu, "machine_seconds": machine, "peak_bytes": self.peak()})
        raise Done

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def rest(self) -> None:
        """Leave a GPU's memory, but for weights and the like, to the others."""
        if self.is_gpu:
            torch.cuda.empty_cache()

    def peak(self) -> int:
        """The most memory so far: of a GPU's tensors, or what the process has grown by since it had its libraries."""
        return torch.cuda.max_memory_allocated() if self.is_gpu else peak_resident_bytes() - self.resident

    def reply(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self.replies, flush=True)


def read_clocks() -> tuple[float, float, float]:
    """Seconds: on the wall; on CPUs, of this process and those it has waited for; on CPUs, of all that runs here."""
    times, machine = os.times(), psutil.cpu_times()
    own = time.process_time() + times.children_user + times.children_system
    waiting = machine.idle + getattr(machine, "iowait", 0.0)
    return time.perf_counter(), own, sum(machine[:8]) - waiting


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """Largest resident memory, on Linux since `forget_peak`."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # which Windows has not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak(is_gpu: bool) -> None:
    """Begin anew with the largest memory, where the system lets a process do so."""
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
