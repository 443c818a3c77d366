"""What a run survives, counted: `make faults` prints the table, tests/training/test_faults.py runs a part of it.

A run is a forked child of a process that has imported everything, so that it starts in a moment and can be killed at
any time. What it leaves is compared, bit for bit, with a run of the same recipe that was never touched.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import safetensors.torch
import torch
import yaml
from conftest import TEXT_LENGTH
from runs import DROPOUT, files, metrics

from hfgpt.checkpoint import checkpoints, newest_checkpoint, verify_checkpoint
from hfgpt.config import load_config
from hfgpt.train import train

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


def start(recipe: Path, folder: Path, prepare: Callable[[], None] = lambda: None) -> int:
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
            train(load_config(recipe, [f"output_dir={folder}"]), resume=True)
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
    from hfgpt import checkpoint

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
        is_saving = manifest.position.step == step
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
    from hfgpt.recorder import Recorder

    training = Recorder.training

    def die_at(step: int) -> Callable[[], None]:
        def prepare() -> None:
            def line(recorder, number, *rest):
                if number == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                training(recorder, number, *rest)

            Recorder.training = line

        return prepare

    for number, moments in enumerate(steps):
        folder = place / f"scripted-{number}"
        for step in moments:
            _, status = os.waitpid(start(recipe, folder, die_at(step)), 0)
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


def whole_run(loop: str, place: Path) -> tuple[Path, Path]:
    """A recipe, and a run of it that nothing disturbs."""
    place.mkdir(parents=True, exist_ok=True)
    recipe = write_recipe(place, loop)
    finish(recipe, place / f"whole-{loop}")
    return recipe, place / f"whole-{loop}"


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


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
