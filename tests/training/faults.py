"""What a run survives, counted: `make faults` prints the table, tests/training/test_faults.py runs a part of it.

A run is a forked child of a process that has imported everything, so that it starts in a moment and can be killed at
any time. What it leaves is compared, bit for bit, with a run of the same recipe that was never touched.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import safetensors.torch
import torch
import yaml
from conftest import TEXT_LENGTH
from runs import DROPOUT, files, metrics
from transformers import PreTrainedTokenizerFast

from hfgpt.config.loading import load_config
from hfgpt.config.schema import DataConfig
from hfgpt.data.prepare import load_rows
from hfgpt.data.rows import TokenRows
from hfgpt.data.text import load_documents
from hfgpt.data.tokenizer import train_tokenizer
from hfgpt.training.checkpoint import checkpoints, newest_checkpoint, verify_checkpoint
from hfgpt.training.train import train

EVENTS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "chmod")
"""Functions of `os` that change what is on the disk."""


def write_recipe(folder: Path, loop: str) -> Path:
    """A run with dropout of 24 steps that saves after every step."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    (folder / "text.txt").write_text(text[:TEXT_LENGTH], encoding="utf-8")
    recipe = {
        "loop": loop,
        "model": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **DROPOUT},
        "tokenizer": {"vocab_size": 300},
        "data": {"files": str(folder / "text.txt"), "validation_fraction": 0.2, "block_size": 64},
        "optim": {"warmup_steps": 3},
        "train": {"max_steps": 24, "batch_size": 2, "gradient_accumulation_steps": 2, "eval_every": 5, "save_every": 1},
        "sample": {"max_new_tokens": 8},
    }
    path = folder / f"{loop}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def start(
    recipe: Path,
    folder: Path,
    prepare: Callable[[], None] = lambda: None,
    on_step: Callable[[int], None] = lambda step: None,
) -> int:
    """Begin a run, or go on with it, in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with (folder.parent / f"{folder.name}.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            prepare()
            train(load_config(recipe, [f"output_dir={folder}"]), resume=True, on_step=on_step)
            status = 0
    finally:
        os._exit(status)


def finish(recipe: Path, folder: Path) -> None:
    """Go on with a run until it is done.

    Raises:
        AssertionError: it cannot.
    """
    _, status = os.waitpid(start(recipe, folder), 0)
    assert status == 0, (folder.parent / f"{folder.name}.log").read_text()[-3000:]


def assert_bit_equal(whole: Path, other: Path) -> None:
    """Compare two finished runs: every line and every file, timing aside.

    Raises:
        AssertionError: they differ.
    """
    assert metrics(whole) == metrics(other)
    expected, found = files(whole), files(other)
    assert expected.keys() == found.keys(), expected.keys() ^ found.keys()
    for name, content in expected.items():
        assert found[name] == content, name


def random_kills(recipe: Path, whole: Path, place: Path, kills: int, seed: int = 0) -> str:
    """Kill a run at random moments, go on, and so on; whenever one gets done, begin another."""
    draws = random.Random(seed)
    started = time.monotonic()
    finish(recipe, place / "timed")
    duration = time.monotonic() - started
    shutil.rmtree(place / "timed")
    done = runs = 0
    while done < kills:
        folder = place / f"killed-{runs}"
        while done < kills:
            child = start(recipe, folder)
            time.sleep(draws.uniform(0.2, 1.0) * duration)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if status == 0:
                break
            assert os.WIFSIGNALED(status), (place / f"{folder.name}.log").read_text()[-3000:]
            done += 1
        finish(recipe, folder)
        assert_bit_equal(whole, folder)
        shutil.rmtree(folder)
        runs += 1
    return f"{done} of {kills} went on, {runs} runs bit-equal"


def count_events(kill_at: int | None, record: Path | None, step: int) -> None:
    """Count what the save of a step does to the disk, before and after each; die at number `kill_at`."""
    from hfgpt.training import checkpoint

    seen = 0
    is_saving = False

    def event() -> None:
        nonlocal seen
        if is_saving:
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    def wrap(function: Callable) -> Callable:
        def wrapped(*arguments, **options):
            event()
            result = function(*arguments, **options)
            event()
            return result

        return wrapped

    save = checkpoint.save_checkpoint

    def save_and_count(folder, manifest, *rest):
        nonlocal is_saving
        is_saving = manifest.state.step == step
        result = save(folder, manifest, *rest)
        if is_saving and record is not None:
            record.write_text(str(seen))
        is_saving = False
        return result

    for name in EVENTS:
        setattr(os, name, wrap(getattr(os, name)))
    torch.save = wrap(torch.save)
    safetensors.torch.save_file = wrap(safetensors.torch.save_file)
    checkpoint.write_text = wrap(checkpoint.write_text)
    checkpoint.save_checkpoint = save_and_count


def enumerated_kills(recipe: Path, whole: Path, place: Path, every: int = 1, step: int = 7) -> str:
    """Kill a run before and after each thing that the save of one step does to the disk."""
    record = place / "events"
    os.waitpid(start(recipe, place / "counted", lambda: count_events(None, record, step)), 0)
    assert_bit_equal(whole, place / "counted")
    events = int(record.read_text())
    assert events > 40, events  # a save of a dozen files, each synced, and the checkpoint before removed
    tried = 0
    for number in range(0, events, every):
        folder = place / f"event-{number}"
        _, status = os.waitpid(start(recipe, folder, lambda at=number: count_events(at, None, step)), 0)
        assert os.WIFSIGNALED(status), (number, (place / f"{folder.name}.log").read_text()[-3000:])
        assert newest_checkpoint(folder, warn=lambda reason: None) is not None
        finish(recipe, folder)
        assert_bit_equal(whole, folder)
        shutil.rmtree(folder)
        tried += 1
    return f"{tried} of {tried} moments (of {events}), bit-equal"


def scripted_kills(recipe: Path, whole: Path, place: Path, steps: tuple[tuple[int, ...], ...]) -> str:
    """Kill at the end of named steps, several times in one run."""

    def die_at(step: int) -> Callable[[int], None]:
        return lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == step else None

    for number, moments in enumerate(steps):
        folder = place / f"scripted-{number}"
        for step in moments:
            _, status = os.waitpid(start(recipe, folder, on_step=die_at(step)), 0)
            assert os.WIFSIGNALED(status), (place / f"{folder.name}.log").read_text()[-3000:]
        finish(recipe, folder)
        assert_bit_equal(whole, folder)
    return f"{len(steps)} of {len(steps)} bit-equal"


def damages(whole: Path, place: Path, offsets: int, flips: int, seed: int = 0) -> str:
    """Truncate, flip one bit of, and delete every file of a checkpoint: each is found, and the one before taken."""
    draws = random.Random(seed)
    newest, before = checkpoints(whole)[:2]
    shutil.copytree(newest, place / newest.name)
    shutil.copytree(before, place / before.name)
    copies = sorted(path for path in (place / newest.name).iterdir())
    originals = {path: path.read_bytes() for path in copies}
    assert verify_checkpoint(place / newest.name)
    tried = found = 0

    def look(path: Path, content: bytes | None) -> None:
        nonlocal tried, found
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        tried += 1
        found += newest_checkpoint(place, warn=lambda reason: None) == place / before.name
        path.write_bytes(originals[path])

    for path, content in originals.items():
        look(path, None)
        for _ in range(offsets):
            look(path, content[: draws.randrange(len(content))])
    weight = [len(content) for content in originals.values()]
    for _ in range(flips):
        path = draws.choices(list(originals), weight)[0]
        damaged = bytearray(originals[path])
        damaged[draws.randrange(len(damaged))] ^= 1 << draws.randrange(8)
        if path.name != "manifest.json":  # flipped white space of JSON is no damage; its content has a checksum
            look(path, bytes(damaged))
    assert found == tried, (found, tried)
    assert verify_checkpoint(place / newest.name)
    return f"{found} of {tried} found, the one before taken"


DYING = """
import os, signal, sys
from pathlib import Path
import datasets, torch
datasets.config.HF_DATASETS_CACHE, datasets.config.IN_MEMORY_MAX_SIZE = Path(sys.argv[1]), 0
datasets.disable_progress_bars()
torch.set_num_threads(1)
from hfgpt.training import checkpoint, evaluate, loop
from hfgpt.config.loading import load_config
from hfgpt.training.train import train

place, recipe, overrides = sys.argv[2], sys.argv[3], sys.argv[4:]
calls = 0

def dies(function, number):
    def dying(*arguments, **options):
        global calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return dying

if os.environ["RANK"] == "1":
    if place == "a step":
        loop.exchange_gradients = dies(loop.exchange_gradients, 15)
    if place == "a save":
        torch.save = dies(torch.save, 7)
    if place == "an evaluation":
        evaluate.score_batches = dies(evaluate.score_batches, 5)
train(load_config(recipe, overrides), resume=True)
"""
"""What each of two processes runs; the second one dies in the place that is named."""


def two_processes(recipe: Path, folder: Path, place: str = "nowhere", *overrides: str) -> tuple[int, float]:
    """Run a recipe on two processes; returns the launcher's exit code, and the seconds it took."""
    program = folder.parent / "dying.py"
    program.write_text(DYING)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", program]
    words += [datasets.config.HF_DATASETS_CACHE, place, recipe, f"output_dir={folder}", *overrides]
    started = time.monotonic()
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            timeout=300,
            check=False,
        )
    return done.returncode, time.monotonic() - started


def killed_ranks(recipe: Path, place: Path) -> str:
    """Kill one of two processes in a step, in a save and in an evaluation: all end, and the run goes on bit for bit."""
    code, duration = two_processes(recipe, place / "two")
    assert code == 0, (place / "two.log").read_text()[-3000:]
    slowest = 0.0
    moments = ("a step", "a save", "an evaluation")
    for moment in moments:
        folder = place / f"killed in {moment}"
        code, seconds = two_processes(recipe, folder, moment)
        assert code != 0, f"nothing died in {moment}"
        slowest = max(slowest, seconds)
        assert two_processes(recipe, folder)[0] == 0, (place / f"{folder.name}.log").read_text()[-3000:]
        assert_bit_equal(place / "two", folder)
    assert slowest < 60 + duration, slowest
    return f"{len(moments)} of {len(moments)} bit-equal; all processes gone after {slowest:.0f} s, starting included"


def a_single_validation_row(recipe: Path, place: Path) -> str:
    """Score a validation text of one row on two processes, and on one: the very same before training."""
    overrides = ["data.validation_fraction=0.03", "train.max_steps=3", "train.save_every=0", "optim.warmup_steps=1"]
    code, _ = two_processes(recipe, place / "single", "nowhere", *overrides)
    assert code == 0, (place / "single.log").read_text()[-3000:]
    train(load_config(recipe, [f"output_dir={place / 'single-one'}", *overrides]))
    [mine, theirs] = [metrics(place / name)[0]["val_loss"] for name in ("single", "single-one")]
    assert abs(mine - theirs) < 1e-6, (mine, theirs)
    return f"no hang, validation loss equal to {abs(mine - theirs):.0e}"


def workers(recipe: Path, whole: Path, place: Path) -> str:
    """Load rows in 2 and 4 processes of their own, after the tokenizer was used: the same run, and no hang."""
    slowest = 0.0
    for number in (2, 4):
        folder = place / f"workers-{number}"
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "hfgpt", "train", recipe, f"output_dir={folder}", f"data.num_workers={number}"],
            env={**os.environ, "HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "fork" not in done.stderr, done.stderr[-3000:]
        slowest = max(slowest, time.monotonic() - started)
        assert metrics(folder) == metrics(whole), folder
    assert slowest < 60, slowest
    return f"2 of 2 with the same lines, {slowest:.0f} s at most"


def large_texts(place: Path) -> str:
    """A line of 100 MB and a million documents come back from their ids, byte for byte."""
    words = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8").split()
    tokenizer = train_tokenizer([" ".join(words)], 400, model_max_length=64)
    line = (" ".join(words) + " ") * (100_000_000 // len(" ".join(words)))
    (place / "line.txt").write_text(line, encoding="utf-8")
    with (place / "many.jsonl").open("w", encoding="utf-8") as file:
        for number in range(1_000_000):
            file.write(json.dumps({"text": words[number % len(words)]}) + "\n")
    found = []
    for name in ("line.txt", "many.jsonl"):
        data = DataConfig(files=str(place / name), validation_fraction=0.01, shuffle_documents=False)
        rows = load_rows(load_documents(data, seed=0), tokenizer, data)
        texts = [decode(rows, tokenizer) for rows in (rows.train, rows.validation)]
        expected = line if name == "line.txt" else "".join(words[number % len(words)] for number in range(1_000_000))
        assert "".join(texts) == expected
        found.append(f"{rows.train_counts.tokens + rows.validation_counts.tokens:,} tokens")
    return f"2 of 2 byte for byte ({', '.join(found)})"


def decode(rows: TokenRows, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of a stream, a thousand ids at a time, without its end-of-text tokens."""
    ids = np.concatenate(rows.tokens.parts)
    cuts = [0, *[start for start in rows.tokens.document_starts.tolist() if start], len(ids)]
    if len(cuts) > 1000:  # short documents: each is a few ids
        return "".join(tokenizer.batch_decode([ids[a + 1 : b].tolist() for a, b in itertools.pairwise(cuts)]))
    # Long ones are decoded in pieces: all text here is ASCII, so no character is cut.
    return "".join(
        tokenizer.decode(ids[piece : min(piece + 100_000, b)].tolist())
        for a, b in itertools.pairwise(cuts)
        for piece in range(a + 1, b, 100_000)
    )


def whole_run(loop: str, place: Path) -> tuple[Path, Path]:
    """A recipe, and a run of it that nothing disturbs."""
    place.mkdir(parents=True, exist_ok=True)
    recipe = write_recipe(place, loop)
    finish(recipe, place / f"whole-{loop}")
    return recipe, place / f"whole-{loop}"


TESTED = [
    ("4", "SIGTERM, SIGINT, SIGUSR1 in training, evaluation, saving", "tests/training/test_signals.py -k signal"),
    ("5, 6", "full disk, failing and forbidden writes", "tests/training/test_checkpoint.py -k 'disk or fails'"),
    ("10", "a config that does not fit its weights", "tests/weights/test_hf_folder.py tests/test_configuration.py"),
    ("11", "a tokenizer that does not fit", "tests -k 'ids_that_the_model or tokenizer_without or another_text'"),
    (
        "12, 13",
        "odd texts and blocks (hypothesis)",
        "tests/data",
    ),
    ("14", "a loss or weight that is no number", "tests/training -k 'diverge or nonfinite or finite'"),
    ("15", "malicious pickles, paths that lead elsewhere", "tests/weights -k 'malicious or elsewhere or hostile'"),
    ("22, 23", "uneven rows; 1, 2 and 1 processes", "tests/training/test_processes.py -k 'fifty or back or split'"),
    ("24", "going on with other settings or another text", "tests/training/test_loop.py -k going_on"),
    ("25", "two runs in one folder", "tests/training/test_signals.py -k 'same_folder or lock'"),
]
"""Row, fault, and the tests that hold its figure."""


def tests(selection: str) -> str:
    """Run some tests, slow ones included, and say how they ended."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not hub and not gpu", *shlex.split(selection)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout.splitlines()[-1].partition(" in ")[0]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    share = 0.1 if parser.parse_args().quick else 1.0
    torch.set_num_threads(1)  # a forked child must not meet threads of its parent
    print("| row | fault | figure | seconds |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        datasets.config.HF_DATASETS_CACHE = root / "cache"
        datasets.disable_progress_bars()
        runs = {loop: whole_run(loop, root / loop) for loop in ("accelerate", "trainer")}

        def row(number: str, what: str, count: Callable[[], str]) -> None:
            started = time.monotonic()
            figure = count()
            print(f"| {number} | {what} | {figure} | {time.monotonic() - started:.0f} |", flush=True)

        for number, loop, kills in (("1", "accelerate", 100), ("2", "trainer", 40)):
            recipe, whole = runs[loop]
            place = recipe.parent
            many, every = max(1, int(kills * share)), max(1, int(1 / share))
            row(
                number,
                f"kill -9 at random moments, saving every step ({loop})",
                lambda r=recipe, w=whole, p=place, n=many: random_kills(r, w, p, n),
            )
            row(
                number,
                f"kill -9 before and after each thing a save does to the disk ({loop})",
                lambda r=recipe, w=whole, p=place, e=every: enumerated_kills(r, w, p, e),
            )
            row(
                "3",
                f"kill -9 two and three times in one epoch, at its end, at step 1 ({loop})",
                lambda r=recipe, w=whole, p=place: scripted_kills(r, w, p, ((2, 5), (7, 8, 9), (6,), (12,), (1,))),
            )
        row(
            "7-9",
            "every file of a checkpoint truncated, bits flipped, deleted",
            lambda: damages(runs["accelerate"][1], root, int(20 * share), int(200 * share)),
        )
        recipe, whole = runs["accelerate"]
        row("12", "a line of 100 MB, a million documents", lambda: large_texts(root))
        row("21", "kill -9 of one of two processes", lambda: killed_ranks(recipe, recipe.parent))
        row("22", "a validation text of one row, two processes", lambda: a_single_validation_row(recipe, recipe.parent))
        row("26", "2 and 4 workers after the tokenizer", lambda: workers(recipe, whole, recipe.parent))
        for number, fault, selection in TESTED:
            row(number, fault, lambda s=selection: tests(s))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
