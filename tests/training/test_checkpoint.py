"""A checkpoint is whole or it is not there."""

import json
import random
import resource
import shutil
import signal

import numpy as np
import pytest
import torch

from hfgpt.training.checkpoint import (
    Manifest,
    TrainState,
    best_checkpoint,
    checkpoints,
    load_states,
    newest_checkpoint,
    restore_random_states,
    save_checkpoint,
    verify_checkpoint,
)


@pytest.fixture
def optimizer():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.ones(3)
    optimizer.step()
    return optimizer


def save(folder, step, optimizer, keep_last=5):
    def write_model(place):
        (place / "weights.bin").write_bytes(bytes(range(200)))

    manifest = Manifest(TrainState(step=step, tokens=step * 10), {"tokenizer": "abc"})
    return save_checkpoint(folder, manifest, write_model, {"optimizer": optimizer}, keep_last)


def test_what_was_saved_is_what_is_loaded(tmp_path, optimizer):
    checkpoint = save(tmp_path, 3, optimizer)
    fresh = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.5)

    load_states(checkpoint, {"optimizer": fresh})

    assert verify_checkpoint(checkpoint) == Manifest(TrainState(step=3, tokens=30), {"tokenizer": "abc"})
    assert torch.equal(fresh.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert fresh.param_groups[0]["lr"] == 0.1


def test_every_random_number_generator_goes_on_where_it_was(tmp_path, optimizer):
    np.random.standard_normal(3)  # noqa: NPY002 - leaves a drawn number in numpy's cache
    checkpoint = save(tmp_path, 1, optimizer)
    wanted = torch.rand(3), np.random.standard_normal(3), random.random()  # noqa: NPY002
    torch.rand(5), np.random.rand(5), random.random()  # noqa: NPY002

    restore_random_states(checkpoint, seed=0)

    drawn = torch.rand(3), np.random.standard_normal(3), random.random()  # noqa: NPY002
    assert torch.equal(drawn[0], wanted[0])
    assert np.array_equal(drawn[1], wanted[1])
    assert drawn[2] == wanted[2]


def test_every_truncation_and_every_flipped_bit_is_found(tmp_path, optimizer):
    checkpoint = save(tmp_path, 1, optimizer)
    draws = np.random.default_rng(0)
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        for _ in range(10):
            place = int(draws.integers(len(content)))
            flipped = bytearray(content)
            flipped[place] ^= 1 << int(draws.integers(8))
            for damaged in (content[:place], bytes(flipped)):
                path.write_bytes(damaged)
                if path.name != "manifest.json" or not same_meaning(damaged, content):
                    with pytest.raises(ValueError, match=path.name):
                        verify_checkpoint(checkpoint)
        path.write_bytes(content)
    assert verify_checkpoint(checkpoint)


def same_meaning(one, other):
    """Whether two manifests say the same: white space has no checksum, and needs none."""
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_every_missing_file_is_found(tmp_path, optimizer):
    checkpoint = save(tmp_path, 1, optimizer)
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        path.unlink()

        with pytest.raises(ValueError, match=path.name):
            verify_checkpoint(checkpoint)

        path.write_bytes(content)


def test_the_newest_checkpoint_that_verifies_is_taken_and_the_others_are_named(tmp_path, optimizer):
    for step in (9, 10, 100):
        save(tmp_path, step, optimizer)
    (tmp_path / "checkpoint-100" / "weights.bin").unlink()
    (tmp_path / "checkpoint-notes").mkdir()
    said = []

    newest = newest_checkpoint(tmp_path, said.append)

    assert newest == tmp_path / "checkpoint-10"
    assert len(said) == 1
    assert "checkpoint-100" in said[0]
    assert "weights.bin" in said[0]


def test_only_the_last_ones_are_kept_and_nothing_half_done_stays(tmp_path, optimizer):
    (tmp_path / ".tmp-checkpoint-7").mkdir()
    for step in (8, 9, 10):
        save(tmp_path, step, optimizer, keep_last=2)

    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-9"]
    assert not list(tmp_path.glob(".tmp*"))


def test_a_save_that_fails_leaves_the_checkpoint_before_it(tmp_path, optimizer):
    save(tmp_path, 1, optimizer)

    def fill_the_disk(place):
        (place / "weights.bin").write_bytes(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(
            tmp_path, Manifest(TrainState(step=2), {}), fill_the_disk, {"optimizer": optimizer}, keep_last=1
        )

    assert newest_checkpoint(tmp_path, warn=pytest.fail) == tmp_path / "checkpoint-1"


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, optimizer, monkeypatch):
    save(tmp_path, 1, optimizer)
    before = sorted(path.name for path in tmp_path.iterdir())
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint-1").iterdir())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=int(1.2 * size) - 1))

    with pytest.raises(OSError, match=r"has 0\.00 GB, a checkpoint needs 0\.00 GB.*go on from checkpoint-1 with"):
        save(tmp_path, 2, optimizer)

    assert sorted(path.name for path in tmp_path.iterdir()) == before
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=int(1.2 * size)))
    save(tmp_path, 2, optimizer)


def test_a_full_disk_leaves_the_checkpoint_before_it_and_nothing_half_done(tmp_path, optimizer):
    save(tmp_path, 1, optimizer)

    def write_more_than_a_file_may_hold(place):
        with (place / "weights.bin").open("wb") as file:
            file.write(bytes(300_000))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails instead of killing
    manifest = Manifest(TrainState(step=2), {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint-2 cannot be written.*File too large.*before it: checkpoint-1"):
            save_checkpoint(tmp_path, manifest, write_more_than_a_file_may_hold, {"optimizer": optimizer}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)

    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert newest_checkpoint(tmp_path, warn=pytest.fail) == tmp_path / "checkpoint-1"


def test_the_best_checkpoint_is_kept_beside_the_last_ones(tmp_path, optimizer):
    for step, val_loss in ((1, 3.0), (2, 2.0), (3, None), (4, 2.5), (5, 2.0)):
        manifest = Manifest(TrainState(step=step), {}, val_loss)
        save_checkpoint(tmp_path, manifest, lambda place: None, {"optimizer": optimizer}, keep_last=1)

    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-2"]  # the first of two bests
    (tmp_path / "checkpoint-2/manifest.json").write_text("{}")
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


def test_on_another_number_of_processes_random_numbers_start_anew(tmp_path, optimizer):
    checkpoint = save(tmp_path, 1, optimizer)
    (checkpoint / "random_states_1.pt").write_bytes((checkpoint / "random_states_0.pt").read_bytes())

    draws = []
    for seed in (5, 5, 6):
        restore_random_states(checkpoint, seed)
        draws.append(torch.rand(3))

    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
