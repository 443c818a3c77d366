"""`hfgpt bench`: hfgpt and others do the same work in turns, and their medians are compared.

Each side is a process of its own, since allocators and compilers have settings of a process. All are ready before the
first turn. Then they take turns, A B C A B C, and while one works the others wait, so that what the machine does
besides falls on all alike. Before that the sides show that they compute the same.
"""

import json
import os
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from safetensors.torch import load_file

from hfgpt.data.python_docs import documents
from hfgpt.data.tokenizer import train_tokenizer
from hfgpt.studio.agreement import TIGHT, check_same
from hfgpt.studio.job import WHOLE_RUNS, Job
from hfgpt.studio.processes import Worker
from hfgpt.studio.sides import SIDES, write_weights
from hfgpt.studio.whole_run import write_random_text
from hfgpt.system.console import print_status

OURS = "hfgpt"
CHECKS = {
    "train": "loss and gradients in fp32",
    "evaluate": "loss in fp32",
    "generate": "every token in fp32",
    "data": "every id",
    "load": "every bit of every tensor",
}
"""What the sides have to have in common before they are timed."""
CHECKED_IF_SAMPLED = "every token of greedy decoding, and the first distribution sampled from, in fp32"
"""The same of `generate` with `--top-k`: two libraries need not draw the same tokens."""
BUSY = 0.1
"""Share of the machine's CPUs that others may use during the turns before the figures are doubtful."""


@dataclass(frozen=True)
class Entrant:
    """One side in the turns."""

    name: str
    allocator: str = "default"

    @property
    def label(self) -> str:
        """Its name in a report."""
        return self.name if self.allocator == "default" or self.name == OURS else f"{self.name} ({self.allocator})"


@contextmanager
def temporary(job: Job) -> Iterator[Job]:
    """The job with a folder, which goes at the end."""
    with tempfile.TemporaryDirectory(prefix="hfgpt-bench-") as folder:
        yield replace(job, folder=folder)


def bench(job: Job) -> dict[str, Any]:
    """Measure a job.

    Returns:
        What `--json` prints; see the README of this room.

    Raises:
        ValueError: the sides do not compute the same; nothing has been timed.
        ChildProcessError: a worker has died.
    """
    with temporary(job) as job:
        prepare(job)
        checked = {name: check_peer(job, name) for name in job.against if name not in WHOLE_RUNS}
        print_status("measuring the machine")
        with Worker("the machine", job) as worker:
            machine = worker.ask(do="measure")
        load = os.getloadavg()[0]
        entrants = [Entrant(OURS, job.allocator), *map(Entrant, job.against)]
        if job.allocator != "default":
            entrants += [Entrant(name, job.allocator) for name in job.against]
        turns, costs = take_turns(job, entrants)
    return report(job, checked, machine, load, turns, costs)


def what_is_checked(job: Job) -> str:
    """What the sides of a job have to have in common."""
    return CHECKED_IF_SAMPLED if job.top_k else CHECKS[job.command]


def padded_vocabulary(job: Job, name: str) -> int:
    """The vocabulary that a peer trains with: nanoGPT's train.py rounds it up to a multiple of 64 for a GPU."""
    vocab_size: int = job.shape["vocab_size"]
    pads = name == "nanogpt" and job.command == "train" and job.device == "cuda"
    return -(-vocab_size // 64) * 64 if pads else vocab_size


def prepare(job: Job) -> None:
    """Write what the sides share: weights in the format of each, or a text and a tokenizer."""
    print_status(f"preparing `bench {job.command}`, {job.size}")
    if job.command == "data":
        texts = list(documents())
        if job.tokenizer is None:
            tokenizer = train_tokenizer(texts, job.shape["vocab_size"], job.shape["n_positions"])
            tokenizer.save_pretrained(job.place("tokenizer"))
        texts += python_sources()
        wanted, number = (job.megabytes or 2) * 1_000_000, 0
        with job.place("text.jsonl").open("w", encoding="utf-8") as file:
            while wanted > 0:
                text = f"{number}\n{texts[number % len(texts)]}"[: int(wanted) + 1]
                file.write(json.dumps({"text": text}) + "\n")
                wanted, number = wanted - len(text), number + 1
        return
    for side in {SIDES[name] for name in {OURS, *job.against} - WHOLE_RUNS.keys()}:
        if not job.place(side.format).exists():
            write_weights(job, job.place(side.format), side.format, side.activation, job.shape["vocab_size"])
    if WHOLE_RUNS.keys() & job.against.keys():
        write_random_text(job)


def python_sources() -> list[str]:
    """Python's own library as texts, about 10 MB, in order."""
    folder = Path(sysconfig.get_path("stdlib"))
    inner = (path for path in sorted(folder.rglob("*.py")) if not {"site-packages", "test"} & set(path.parts))
    return [path.read_text(encoding="utf-8", errors="replace") for path in inner if path.stat().st_size]


def check_peer(job: Job, name: str) -> float:
    """Let hfgpt and a peer compute the same once, each in a process of its own.

    Both have what is the peer's alone, its activation and the padding of its vocabulary; when they are timed, each has
    its own.

    Returns:
        How far apart they are, see `agreement.difference`.

    Raises:
        ValueError: too far.
    """
    print_status(f"comparing with {name}: {what_is_checked(job)}")
    vocab_size, results = padded_vocabulary(job, name), []
    with Worker(OURS, job) as mine, Worker(name, job) as other:  # both import while the weights are written
        for side, worker in ((OURS, mine), (name, other)):
            place = f"check-{name}-{side}"
            if job.command != "data":
                write_weights(job, job.place(place), SIDES[side].format, SIDES[name].activation, vocab_size)
            result = job.place(f"{place}.safetensors")
            worker.ask(do="check", name=side, place=place, vocab_size=vocab_size, result=str(result))
            results.append(load_file(result))
    ours, theirs = results
    has_numbers = job.command in ("train", "evaluate") or job.top_k is not None
    return check_same(ours, theirs, (OURS, name), TIGHT if has_numbers else 0.0)


def take_turns(job: Job, entrants: list[Entrant]) -> tuple[dict[str, list[dict[str, float]]], dict[str, Any]]:
    """Let every side work in turns, while the others wait.

    Returns:
        By label the answers of the worker, one a round, and what a step of ours costs.
    """
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        costs: dict[str, Any] = {}
        for entrant in entrants:
            workers[entrant.label] = stack.enter_context(Worker(entrant.label, job, entrant.allocator))
        for entrant in entrants:  # one after the other: each may need all of a GPU's memory
            print_status(f"making {entrant.label} ready")
            place = "" if entrant.name in WHOLE_RUNS or job.command == "data" else SIDES[entrant.name].format
            task = {"name": entrant.name, "place": place, "vocab_size": padded_vocabulary(job, entrant.name)}
            ready = workers[entrant.label].ask(do="repeat", **task)
            costs = costs or ready
        turns: dict[str, list[dict[str, float]]] = {label: [] for label in workers}
        for number in range(job.rounds + 1):  # the first one warms up
            print_status(f"round {number} of {job.rounds}" if number else "warming up")
            for label, worker in workers.items():
                worker.send({"steps": job.steps})
                turns[label].append(worker.receive())
    return {label: answers[1:] for label, answers in turns.items()}, costs


def report(
    job: Job,
    checked: dict[str, float],
    machine: dict[str, Any],
    load: float,
    turns: dict[str, list[dict[str, float]]],
    costs: dict[str, Any],
) -> dict[str, Any]:
    """All that was measured, as one object."""
    sides = {label: side_report(job, answers, machine["peaks"], costs) for label, answers in turns.items()}
    same = {name: Entrant(name, job.allocator).label for name in job.against if job.allocator != "default"}
    wall = sum(answer["seconds"] for answers in turns.values() for answer in answers)
    others = sum(answer["machine_seconds"] - answer["cpu_seconds"] for answers in turns.values() for answer in answers)
    share = max(0.0, others / (wall * (os.cpu_count() or 1)))
    result = {
        "command": job.command,
        "size": job.size,
        "model": job.shape,
        **{name: getattr(job, name) for name in ("device", "precision", "compile", "rows", "row_tokens")},
        **{name: getattr(job, name) for name in ("rounds", "steps", "allocator", "stride", "processes", "tokenizer")},
        "unit": costs["unit"],
        "top_k": job.top_k,
        "checked": what_is_checked(job),
        "difference": checked,
        "sides": sides,
        "ratios": {name: ratios(sides[OURS], sides[name]) for name in job.against},
        "ratios_same_allocator": {name: ratios(sides[OURS], sides[label]) for name, label in same.items()},
        "ratios_of_runs": {
            run: {name: ratios(sides[run], sides[name]) for name in job.against if name not in WHOLE_RUNS}
            for run in job.against
            if run in WHOLE_RUNS
        },
        "peaks": machine["peaks"],
        "load_before": load,
        "cpu_share_of_others": share,
        "environment": machine["environment"],
        "warnings": [],
    }
    if share > BUSY:
        result["warnings"].append(
            f"other programs used {share:.0%} of the CPUs during the turns: wall time says little, compare CPU time."
        )
    if load > 0.5 * (os.cpu_count() or 1):
        result["warnings"].append(f"the load average was {load:.1f} before the first turn: the figures are doubtful.")
    return result


def side_report(
    job: Job, answers: list[dict[str, float]], peaks: dict[str, float], costs: dict[str, Any]
) -> dict[str, Any]:
    """The medians of one side, and what each round took, per step."""
    seconds, cpu_seconds = ([answer[name] / job.steps for answer in answers] for name in ("seconds", "cpu_seconds"))
    typical = median(seconds)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "median_seconds": typical,
        "median_cpu_seconds": median(cpu_seconds),
        "units_per_second": costs["units"] / typical,
        "peak_bytes": max(answer["peak_bytes"] for answer in answers),
        "share_of_matmul_peak": costs["flops"] / typical / peaks["flops"] if "flops" in costs else None,
        "share_of_bandwidth": costs["bytes"] / typical / peaks["bytes"] if "bytes" in costs else None,
    }


def ratios(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """How many times as long a peer takes: median, least and largest of the ratios of neighbouring turns."""

    def ratio(name: str) -> dict[str, float]:
        each = [their / my if my else float("inf") for my, their in zip(mine[name], theirs[name], strict=True)]
        return {"median": median(each), "min": min(each), "max": max(each)}

    return {"wall": ratio("seconds"), "cpu": ratio("cpu_seconds")}
