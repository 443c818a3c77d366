"""The driver's end of a worker process: a task in, answers out, and one line where it dies."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from hfgpt.studio.job import Job
from hfgpt.system.allocator import ALLOCATORS


class Worker:
    """A process that imports its libraries and then waits for a task; leaving the `with` ends it.

    Args:
        label: what it is called in messages.
        job: the benchmark.
        allocator: a key of `ALLOCATORS`.
    """

    def __init__(self, label: str, job: Job, allocator: str = "default") -> None:
        self.label, self.job = label, job
        self.log = job.place(f"{uuid4()}.log")
        environment = {**os.environ, **ALLOCATORS[allocator], "HF_DATASETS_CACHE": str(job.place(f"{uuid4()}-cache"))}
        # The library that runs here, and not that of the folder in which the command was given.
        roots = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, roots))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "hfgpt.studio.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )

    def ask(self, **task: Any) -> dict[str, Any]:
        """Give it its task, see worker.py, and wait for its first answer; see `receive`."""
        self.send({**task, "job": vars(self.job)})
        return self.receive()

    def send(self, request: dict[str, Any]) -> None:
        """Write a line to the worker; whether it is alive, the answer shows."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return

    def receive(self) -> dict[str, Any]:
        """Wait for its next answer.

        Raises:
            ValueError: it refuses the task.
            ChildProcessError: it has ended without an answer.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            if "refused" in answer:
                raise ValueError(answer["refused"])
            return answer
        code = self.process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if code > 0 and line.strip()), "")
        raise ChildProcessError(f"the worker of {self.label} {how}. {said}".strip())

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue
