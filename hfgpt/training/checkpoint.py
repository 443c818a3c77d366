"""Checkpoints that a kill at any moment cannot spoil; one implementation for both loops.

A checkpoint is staged in a hidden folder, every file is brought to the disk, a manifest with each file's size and
sha256 is written last, and only then the folder gets its name: `checkpoint-N` is whole, or it is not there. Older ones
are removed after that. Going on takes the newest whose manifest holds.
"""

import os
import random
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import set_seed

from hfgpt.system.storage import (
    MANIFEST,
    check_files,
    make_readable,
    read_manifest,
    seal,
    sha256,
    sync,
    unseal,
    write_atomically,
)

STAGING_PREFIX = ".tmp-checkpoint-"
SPACE_FACTOR = 1.2  # of the newest checkpoint's size that must be free to begin another


@dataclass(frozen=True)
class TrainState:
    """Where in a run training stands.

    Attributes:
        step: optimizer steps done.
        epoch: passes over the training rows done.
        rows: training rows of the current epoch done, over all processes.
        tokens: targets trained on so far, over all processes.
    """

    step: int = 0
    epoch: int = 0
    rows: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Manifest:
    """The manifest of a checkpoint.

    Attributes:
        state: where the run stood.
        identity: what must be the same to go on from here: tokenizer, rows, rows per step.
        val_loss: nats per token, if the validation rows were scored at this step.
        origins: where model and tokenizer came from when the run began, see `hfgpt.training.run.Run`.
        is_compiled: whether the model ran compiled.
    """

    state: TrainState
    identity: dict[str, Any]
    val_loss: float | None = None
    origins: dict[str, str] = field(default_factory=dict)
    is_compiled: bool = False


def save_checkpoint(
    folder: Path,
    manifest: Manifest,
    write_model: Callable[[Path], None],
    states: dict[str, Any],
    keep_last: int,
    stream: Any = None,
) -> Path:
    """Write `folder/checkpoint-N`; every process calls it.

    Args:
        folder: the run's output folder.
        manifest: what to go on from, and with what.
        write_model: writes the model into the folder it is given; called on every process.
        states: name -> object with `state_dict()`; optimizer, schedule, scaler.
        keep_last: checkpoints to keep, this one included; the one with the lowest validation loss is kept besides.
        stream: this process's own object with `state_dict()`, if it reads its text as it comes.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it cannot be written, such as on a full disk; the checkpoints before it stay, and nothing half done.
    """
    process = PartialState()
    staging = folder / f"{STAGING_PREFIX}{manifest.state.step}"
    final = folder / f"checkpoint-{manifest.state.step}"
    if process.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
        check_disk_space(folder)
        staging.mkdir(parents=True)
    process.wait_for_everyone()
    try:
        torch.save(random_states(), staging / f"random_states_{process.process_index}.pt")
        if stream is not None:
            torch.save(stream.state_dict(), staging / f"stream_{process.process_index}.pt")
        process.wait_for_everyone()
        write_model(staging)
        for name, holder in states.items():
            state = holder.state_dict()  # put together from all processes, where it is split
            if process.is_main_process:
                torch.save(state, staging / f"{name}.pt")
        if process.is_main_process:
            commit(staging, final, manifest)
            prune(folder, keep_last)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        shutil.rmtree(staging, ignore_errors=True)
        before = ", ".join(path.name for path in checkpoints(folder)) or "none"
        reason = " ".join(str(error).split())
        raise OSError(f"{final.name} cannot be written ({reason}). Checkpoints before it: {before}.") from error
    process.wait_for_everyone()
    return final


def check_disk_space(folder: Path) -> None:
    """Refuse to begin a checkpoint that the disk has no room for, by the size of the newest one.

    Raises:
        OSError: saying how much is needed and there.
    """
    newest = next(iter(checkpoints(folder)), None)
    if newest is None:
        return
    needed = int(SPACE_FACTOR * sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"the disk of {folder} has {free / 1e9:.2f} GB, a checkpoint needs {needed / 1e9:.2f} GB. Make room, then "
            f"go on from {newest.name} with `--resume`."
        )


def commit(staging: Path, final: Path, manifest: Manifest) -> None:
    """Bring every file to the disk, write the manifest last, and give the folder its name."""
    files = {}
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        make_readable(path)
        sync(path)
        files[path.relative_to(staging).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_text(staging / MANIFEST, seal({**asdict(manifest), "files": files}))
    sync(staging / MANIFEST)
    sync(staging)
    if final.exists():  # from a run that was resumed at an earlier step and came here again
        os.rename(final, final.with_name(f"{STAGING_PREFIX}{manifest.state.step}-replaced"))
    os.rename(staging, final)
    sync(final.parent)


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; its files are not looked at.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {MANIFEST}.")
    content = read_manifest(folder)
    del content["files"]
    try:
        return Manifest(**{**content, "state": TrainState(**content["state"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: {' '.join(str(error).split())}.") from error


def verify_checkpoint(folder: Path) -> Manifest:
    """Check every file of a checkpoint against its manifest.

    Raises:
        ValueError: naming the folder and the first fault.
    """
    manifest = load_manifest(folder)
    check_files(folder)
    return manifest


def record_score(folder: Path, val_loss: float) -> None:
    """Add to a checkpoint the validation loss of its weights, which were scored only after it was written."""
    content = unseal((folder / MANIFEST).read_text(encoding="utf-8"))
    write_atomically(folder / MANIFEST, seal({**content, "val_loss": val_loss}).encode())


def checkpoints(folder: Path) -> list[Path]:
    """The folders `checkpoint-N`, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, or None; `warn` is called with the reason for each that was skipped."""
    for path in checkpoints(folder):
        try:
            verify_checkpoint(path)
        except ValueError as error:
            warn(f"skipped {path.name}: {error}")
            continue
        return path
    return None


def supersede(folder: Path, step: int) -> None:
    """Put checkpoints after `step` aside: the run goes on from that step, and they are no longer part of it."""
    for path in checkpoints(folder):
        if int(path.name.split("-")[1]) > step:
            aside = path.with_name(f"superseded-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints and the best one, and what an interrupted save left."""
    best = best_checkpoint(folder)
    for path in checkpoints(folder)[keep_last:]:
        if path != best:
            shutil.rmtree(path)
    for path in folder.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(path)


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, the older one of equals; None if none was scored.

    Only manifests are read; a checkpoint whose manifest is damaged is none.
    """
    scored: list[tuple[float, int, Path]] = []
    for path in checkpoints(folder):
        with suppress(ValueError):
            manifest = load_manifest(path)
            if manifest.val_loss is not None:
                scored.append((manifest.val_loss, manifest.state.step, path))
    return min(scored)[2] if scored else None


def load_states(checkpoint: Path, states: dict[str, Any], stream: Any = None) -> None:
    """Give optimizer, schedule, scaler and stream back what `save_checkpoint` took from them."""
    if stream is not None:
        path = checkpoint / f"stream_{PartialState().process_index}.pt"
        stream.load_state_dict(torch.load(path, weights_only=True))
    for name, holder in states.items():
        holder.load_state_dict(torch.load(checkpoint / f"{name}.pt", map_location="cpu", weights_only=True))


def random_states() -> dict[str, Any]:
    """The random number generators of Python, numpy, torch and CUDA, in types that torch loads without running code."""
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 - libraries draw from the global one
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy_key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_rest": (int(numpy_state["state"]["pos"]), int(numpy_state["has_gauss"]), float(numpy_state["gauss"])),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(checkpoint: Path, seed: int) -> None:
    """Set every random number generator of this process to what it was at the checkpoint.

    On another number of processes than the checkpoint's nothing could go on where it was: each then starts at `seed`,
    the step and its own number.
    """
    process = PartialState()
    if len(list(checkpoint.glob("random_states_*.pt"))) != process.num_processes:
        step = int(checkpoint.name.split("-")[1])
        set_seed((seed + step + process.process_index) % 2**32)
        return
    states = torch.load(checkpoint / f"random_states_{process.process_index}.pt", weights_only=True)
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    key = states["numpy_key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, *states["numpy_rest"]))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
