"""What push and pull survive, counted: `python tests/hub/hub_faults.py` prints the table, `--quick` a part of it.

Every case is a push or a pull of a small real model through huggingface_hub's own client, over a socket, with one fault
in the way: at an endpoint, of a kind, once, twice or always. The cases run side by side, since most of their time is
waiting.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hub_client import connected
from hub_models import SENT, save_run
from hub_server import ALWAYS, TestHub

from hfgpt.hub.pull import pull
from hfgpt.hub.push import push
from hfgpt.hub.retry import TRIES, HubError

PUSH_ENDPOINTS = (
    *("create", "info", "branch", "refs", "validate-yaml", "preupload", "lfs-batch", "lfs-put", "lfs-verify"),
    *("commit", "tag"),
)
PULL_ENDPOINTS = ("info", "head", "get", "storage-get")
KINDS = (("status", 503), ("status", 500), ("limit", 0), ("drop", 0))
TIMES = (1, 2, ALWAYS)
MOST_TRIES = 7
"""For one file, huggingface_hub 2.4 asks seven times for its checksum and six times for all else that it retries."""
LONGEST_SECONDS = 60


@dataclass(frozen=True)
class Case:
    """One fault in the way of a push or a pull."""

    row: int
    way: str
    endpoint: str
    kind: str
    times: int
    value: float = 0

    def __str__(self) -> str:
        times = {1: "once", 2: "twice", ALWAYS: "always"}[self.times]
        kind = f"{self.value:.0f}" if self.kind == "status" else self.kind
        return f"{self.way}: {kind} at {self.endpoint}, {times}"


def all_cases() -> list[Case]:
    """Rows 16, 17 and 19 of the fault matrix."""
    cases = [
        Case(16, way, endpoint, kind, times, value)
        for way, endpoints in (("push", PUSH_ENDPOINTS), ("pull", PULL_ENDPOINTS))
        for endpoint in endpoints
        for kind, value in KINDS
        for times in TIMES
    ]
    changing = ("create", "branch", "lfs-put", "lfs-verify", "commit", "tag")
    cases += [Case(17, "push", endpoint, "lose", times) for endpoint in changing for times in TIMES]
    cases += [Case(17, "pull request", "commit", "lose", times) for times in (1, ALWAYS)]
    for endpoint in ("get", "storage-get"):
        cases += [
            Case(19, "pull", endpoint, kind, times) for kind in ("truncate", "shorten", "flip") for times in TIMES
        ]
        cases += [Case(19, "pull", endpoint, "stall", times, value=3) for times in (1, 2)]
    return cases


def quick_cases() -> list[Case]:
    """A part that needs no more than a few seconds of waiting."""
    at_length = ("preupload", "lfs-batch", "lfs-put", "lfs-verify", "head")  # where huggingface_hub waits by itself

    def is_quick(case: Case) -> bool:
        if case.times == 1:
            return case.row != 16 or case.value == 503
        if case.times == 2:
            return case.kind == "drop" and case.endpoint not in at_length
        if case.row == 16:
            return case.value == 503 and case.endpoint in ("create", "info", "commit", "get")
        return (case.kind, case.endpoint) in (("lose", "commit"), ("flip", "storage-get"))

    return [case for case in all_cases() if is_quick(case)]


class Failed(AssertionError):
    """A case did not end as it must."""


def check(is_right: bool, what: object) -> None:
    if not is_right:
        raise Failed(what)


def run_case(case: Case, hub: TestHub, folder: Path, place: Path, number: int) -> None:
    """Push or pull with a fault in the way, and look at what is left.

    Raises:
        Failed: a commit too many or too few, other files, too many tries, too long.
    """
    repo = f"anna/case-{number}"
    started = time.monotonic()
    if case.way == "pull":
        hub.put(repo, "Upload model", {path.name: path.read_bytes() for path in folder.iterdir() if path.name in SENT})
    elif case.way == "pull request":
        hub.put(repo, "initial commit", {})
    else:
        # For endpoints that name no repository in their address, the card does.
        folder = shutil.copytree(folder, place / str(number) / "demo")
        (folder / "README.md").write_text(f"# {repo}\n")
        if case.endpoint not in ("create", "branch"):
            hub.put(repo, "initial commit", {})
    hub.fail(case.endpoint, case.kind, case.times, repo, case.value)
    error = None
    try:
        if case.way == "pull":
            pull(repo, place / f"pulled-{number}")
        elif case.way == "pull request":
            push(folder, repo, create_pr=True)
        else:
            push(folder, repo, revision="next", tag="v1", message="Upload model")
    except HubError as failure:
        error = failure
    check(time.monotonic() - started < LONGEST_SECONDS, f"took {time.monotonic() - started:.0f} s")
    check("\n" not in str(error), error)
    tries = [seen.path for seen in hub.requests(case.endpoint, repo) if seen.fault]
    most = max(tries.count(path) for path in set(tries)) if tries else 0
    check(most >= 1, "the fault was never met")
    check(most <= (2 * TRIES if case.kind in ("flip", "shorten") else MOST_TRIES), f"{most} tries")
    if case.times != ALWAYS:
        check(error is None, error)
    if case.way == "pull":
        check_pulled(case, hub, repo, place / f"pulled-{number}", error)
    else:
        check_pushed(case, hub, repo, folder, error)


def check_pulled(case: Case, hub: TestHub, repo: str, copy: Path, error: HubError | None) -> None:
    if case.times == ALWAYS:
        check(error is not None and not copy.exists(), "there is a folder though nothing whole came")
        return
    there = {path.name: path.read_bytes() for path in copy.iterdir() if path.name != ".pulled.json"}
    check(there == hub.files(repo), "the copy is not the repository")


def check_pushed(case: Case, hub: TestHub, repo: str, folder: Path, error: HubError | None) -> None:
    revision = "refs/pr/1" if case.way == "pull request" else "next"
    is_applied = case.times != ALWAYS or case.kind == "lose" or case.endpoint == "tag"
    if repo not in hub.repos:
        check(case.times == ALWAYS and error is not None, "there is no repository")
        return
    uploads = sum(commit.title == "Upload model" for commit in hub.repos[repo].commits())
    check(uploads <= 1, f"{uploads} commits")
    check("refs/pr/2" not in hub.repos[repo].refs, "a second pull request")
    if case.times == ALWAYS:
        # Of the commit whose answer is always lost, the Hub is asked whether it is there.
        check((error is None) == (case.endpoint == "commit" and case.kind == "lose"), error)
    if error is None:
        check(uploads == 1, f"{uploads} commits")
        wanted = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in SENT}
        there = hub.files(repo, revision)
        del there[".gitattributes"]
        check(there == wanted, "the repository does not hold the folder")
        check(case.way != "push" or "refs/tags/v1" in hub.repos[repo].refs, "no tag")
    elif not is_applied:
        check(uploads == 0, f"{uploads} commits")


def run_cases(cases: Iterable[Case], hub: TestHub, folder: Path, place: Path) -> dict[Case, str]:
    """Run cases side by side; returns what is wrong with each, an empty text if nothing is."""
    cases = list(cases)

    def outcome(number: int) -> str:
        try:
            run_case(cases[number], hub, folder, place, number)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    with ThreadPoolExecutor(max_workers=48) as threads:
        return dict(zip(cases, threads.map(outcome, range(len(cases))), strict=True))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="only what waits for no more than a few seconds")
    cases = quick_cases() if parser.parse_args().quick else all_cases()
    titles = {
        16: "Hub answers 500, 503, 429 or hangs up, at each endpoint, once, twice, always",
        17: "Hub does it and its answer is lost",
        19: "download truncated, short, one bit flipped, stalled",
    }
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        save_run(place / "demo")
        with connected(place / "home") as hub:
            started = time.monotonic()
            outcomes = run_cases(cases, hub, place / "demo", place)
    print("| row | fault | figure |\n|---|---|---|")
    for row, title in titles.items():
        results = [outcome for case, outcome in outcomes.items() if case.row == row]
        print(f"| {row} | {title} | {results.count('')} of {len(results)} ended as they must |")
    print(f"\n{len(cases)} cases side by side in {time.monotonic() - started:.0f} s")
    for case, outcome in outcomes.items():
        if outcome:
            print(f"{case}: {outcome}")
    raise SystemExit(any(outcomes.values()))


if __name__ == "__main__":
    main()
