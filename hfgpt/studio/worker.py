"""The process of one side: `python -m hfgpt.studio.worker`, started by processes.py.

It reads one JSON line with its task, does it, and answers with JSON lines. What libraries print to stdout comes out on
stderr.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import datasets
import torch
from safetensors.torch import save_file

from hfgpt.studio.job import Job
from hfgpt.studio.pacer import Done, Pacer
from hfgpt.studio.work import run_again, run_once
from hfgpt.system.machine import environment, matmul_peak, wait

COPIED = 2**28
"""Bytes of the copy that measures the bandwidth of memory: more than any cache holds."""
COPIES = 5


def main() -> None:
    """Do the task on stdin; a mistake of the user's is answered with `refused`."""
    replies = open(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    datasets.disable_progress_bars()
    task = json.loads(sys.stdin.readline())
    job = Job(**task["job"])
    try:
        DO[task["do"]](task, job, replies)
    except ValueError as error:
        reply(replies, {"refused": str(error)})
    replies.close()


def check(task: dict[str, Any], job: Job, replies: TextIO) -> None:
    """Write what the side computes to a file."""
    result = run_once(task["name"], job, task["place"], task["vocab_size"])
    save_file({name: each.detach().cpu().clone() for name, each in result.items()}, Path(task["result"]))
    reply(replies, {"done": True})


def repeat(task: dict[str, Any], job: Job, replies: TextIO) -> None:
    """Take steps in turns, until the driver wants no more."""
    pacer = Pacer(sys.stdin, replies, job.device == "cuda")
    try:
        run_again(task["name"], job, task["place"], task["vocab_size"], pacer)
    except Done:
        return


def measure(task: dict[str, Any], job: Job, replies: TextIO) -> None:
    """Measure the machine: operations of a matrix product, and bytes read and written, per second."""
    device = torch.device(job.device)
    source = torch.ones(COPIED // 4, device=device)
    copy, seconds = torch.empty_like(source), []
    for _ in range(COPIES):
        before = read_clock(device)
        copy.copy_(source)
        seconds.append(read_clock(device) - before)
    peaks = {"flops": matmul_peak(device, job.precision), "bytes": 2 * COPIED / min(seconds)}
    reply(replies, {"peaks": peaks, "environment": environment()})


def read_clock(device: torch.device) -> float:
    wait(device)
    return time.perf_counter()


def reply(replies: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=replies, flush=True)


DO = {"check": check, "repeat": repeat, "measure": measure}

if __name__ == "__main__":
    main()
