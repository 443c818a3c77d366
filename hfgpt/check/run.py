"""Each promise tried in turn, and what came of it."""

import logging
import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
import transformers
from transformers.utils import logging as transformers_logging

from hfgpt.check import promises  # noqa: F401 - registered
from hfgpt.check.known_faults import KnownFault, find_known_fault
from hfgpt.check.promise import GROUPS, PROMISES, Finding, NotDone, Promise
from hfgpt.check.resolve import resolve
from hfgpt.check.subject import Subject
from hfgpt.system.suggest import did_you_mean

TIME_LIMIT_SECONDS = 180
"""After it no further promise is tried, unless another limit is given."""


@dataclass(frozen=True)
class Result:
    """A promise, what was found, how long it took, and the fault of transformers' own that explains it, if any."""

    promise: Promise
    finding: Finding
    elapsed_seconds: float
    known_fault: KnownFault | None = None

    @property
    def is_failed(self) -> bool:
        """Whether the promise is broken; one that a known fault explains is."""
        return self.finding.status == "fail"


@dataclass(frozen=True)
class Report:
    """What came of every promise that was tried."""

    subject: Subject
    results: list[Result]
    peak_memory_bytes: int

    @property
    def is_passed(self) -> bool:
        """Whether no promise is broken; one that was not tried is not: see `not_tried`."""
        return not any(result.is_failed for result in self.results)

    def failed(self) -> list[str]:
        """Names of the broken promises."""
        return [result.promise.name for result in self.results if result.is_failed]

    def not_tried(self) -> list[str]:
        """Names of the promises for which the time did not suffice."""
        return [result.promise.name for result in self.results if result.finding.status == "not tried"]

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "model": self.subject.what,
            "class": self.subject.model_class.__name__,
            "is_small": self.subject.is_small,
            "parameters": self.subject.make().num_parameters(),
            "is_passed": self.is_passed,
            "not_tried": self.not_tried(),
            "elapsed_seconds": round(sum(result.elapsed_seconds for result in self.results), 2),
            "peak_memory_bytes": self.peak_memory_bytes,
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
            "promises": [
                {
                    "name": result.promise.name,
                    "group": result.promise.group,
                    **asdict(result.finding),
                    "elapsed_seconds": round(result.elapsed_seconds, 3),
                    "known_fault": None if result.known_fault is None else asdict(result.known_fault),
                }
                for result in self.results
            ],
        }


def check(
    what: str | Subject,
    *,
    only: Sequence[str] = (),
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
    time_limit_seconds: float | None = None,
) -> Report:
    """Try what a causal language model promises.

    Args:
        what: see `resolve`; or a subject made by hand.
        only: names of promises or of groups; none are all.
        trust_remote_code: whether code that lies beside the weights may be run.
        progress: told the name of each promise before it is tried.
        time_limit_seconds: after it no further promise is tried; None is `TIME_LIMIT_SECONDS`.

    Raises:
        ValueError: there is no such model or promise, or the model's code is not trusted.
    """
    chosen = choose_promises(only)
    with silenced():
        limit = TIME_LIMIT_SECONDS if time_limit_seconds is None else time_limit_seconds
        return check_chosen(what, chosen, trust_remote_code, progress, limit)


def check_chosen(
    what: str | Subject,
    chosen: list[Promise],
    trust_remote_code: bool,
    progress: Callable[[str], None] | None,
    time_limit_seconds: float,
) -> Report:
    """Try these promises; see `check`."""
    with without_prints():
        subject = what if isinstance(what, Subject) else resolve(what, trust_remote_code)
    started_at = perf_counter()
    results = []
    for each in chosen:
        if progress is not None:
            progress(each.name)
        if perf_counter() - started_at > time_limit_seconds:
            finding = Finding("not tried", detail=f"{time_limit_seconds:g} s were over before its turn")
            results.append(Result(each, finding, 0.0))
        else:
            results.append(try_promise(each, subject))
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    return Report(subject, results, kibibytes * 1024)


@contextmanager
def silenced() -> Iterator[None]:
    """Let libraries log nothing of what is done to the model on purpose, nor of themselves, and show no bars."""
    # Of transformers too: it has handlers of its own, which say things once and then never again.
    verbosity, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    disabled = logging.root.manager.disable
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def without_prints() -> Iterator[None]:
    """Drop what is printed: a model is built some hundred times, and its constructor may greet each time."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def choose_promises(only: Sequence[str]) -> list[Promise]:
    """The promises of these names or groups, in the order in which they are tried; all if there are no names.

    Raises:
        ValueError: one is neither.
    """
    for name in only:
        if name not in PROMISES and name not in GROUPS:
            near = did_you_mean(name, [*PROMISES, *GROUPS])
            raise ValueError(f"there is no promise {name!r}.{near} The groups are {', '.join(GROUPS)}.")
    chosen = [each for each in PROMISES.values() if not only or each.name in only or each.group in only]
    return sorted(chosen, key=lambda each: GROUPS.index(each.group))


def try_promise(promise: Promise, subject: Subject) -> Result:
    """Find out about one promise; an error in the model breaks it, and is reported.

    Each starts from the same random state, so that it finds the same whether or not others are tried before it.
    """
    started_at = perf_counter()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), without_prints():
        warnings.simplefilter("ignore")  # what libraries say of the model is no finding
        torch.manual_seed(0)
        try:
            finding = promise.find(subject)
        except NotDone as slow:
            finding = Finding("not tried", detail=str(slow))
        except Exception as error:  # whatever a stranger's model raises is what was found
            line = next(iter(str(error).strip().splitlines()), "")
            finding = Finding("fail", type(error).__name__, "no error", f"{type(error).__name__}: {line}")
    known_fault = find_known_fault(subject, promise.name) if finding.status == "fail" else None
    return Result(promise, finding, perf_counter() - started_at, known_fault)
