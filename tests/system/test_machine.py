"""What is said of a machine."""

import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from hfgpt import HFGPTConfig, HFGPTForCausalLM
from hfgpt.system import machine
from hfgpt.system.machine import matmul_peak, peak_memory_bytes, training_flops_per_token

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_environment_says_what_ran():
    found = machine.environment()

    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["cpu_count"] == os.cpu_count()
    assert found["threads"] == torch.get_num_threads()
    assert all(found[name] for name in (*machine.PACKAGES, "platform", "device"))
    assert found == json.loads(json.dumps(found))


def test_the_environment_names_no_machine_no_user_and_no_folder():
    text = " ".join(map(str, machine.environment().values()))

    for private in {platform.node(), Path.home().name, str(Path(machine.__file__).parents[2])} - {""}:
        assert not re.search(rf"(?<!\w){re.escape(private)}(?!\w)", text)


def checkout(root: Path, name: str) -> Path:
    """The least that git takes for a repository, with `COMMIT` checked out."""
    for folder in ("objects", "refs"):
        (root / ".git" / folder).mkdir(parents=True)
    (root / ".git" / "HEAD").write_text(COMMIT + "\n")
    (root / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n')
    return root


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_hfgpts_own_checkout(tmp_path, monkeypatch):
    own = checkout(tmp_path / "own", "hfgpt")
    another = checkout(tmp_path / "another", "somebody-elses")
    (own / "site-packages").mkdir()

    assert machine.git_commit(own) == COMMIT
    assert machine.git_commit(another) is None
    assert machine.git_commit(own / "site-packages") is None  # a wheel, installed somewhere inside a checkout
    (another / ".git" / "HEAD").write_text(COMMIT[::-1])
    monkeypatch.setenv("GIT_DIR", str(another / ".git"))  # as in a hook of another repository
    assert machine.git_commit(own) == COMMIT


def test_there_is_no_commit_before_the_first_one_and_none_without_git(tmp_path, monkeypatch):
    own = checkout(tmp_path / "own", "hfgpt")

    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.git_commit(own) is None
    monkeypatch.undo()
    (own / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    assert machine.git_commit(own) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the memory of the process")
def test_peak_memory_is_in_bytes_and_remembers_what_was_freed():
    tensor = torch.ones(64, 2**20)  # 256 MiB
    with_tensor = peak_memory_bytes()
    del tensor

    assert 256 * 2**20 < with_tensor < 64 * 2**30
    assert peak_memory_bytes() >= with_tensor


@pytest.mark.gpu
def test_peak_memory_on_a_gpu_is_that_of_its_tensors():
    tensor = torch.ones(64, 2**20, device="cuda")
    del tensor

    assert torch.cuda.max_memory_allocated() == peak_memory_bytes() >= 256 * 2**20
    assert machine.environment()["device"] == torch.cuda.get_device_name()


BATCH, BLOCK = 3, 24


@pytest.mark.parametrize("tied", [True, False])
def test_operations_of_a_token_are_those_that_torch_counts(tiny, tied):
    model = HFGPTForCausalLM(HFGPTConfig(**tiny, tie_word_embeddings=tied, attn_implementation="eager"))
    ids = torch.randint(320, (BATCH, BLOCK), generator=torch.Generator().manual_seed(0))

    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids).logits  # the loss that makes none has a product in place, which is not counted
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()

    assert training_flops_per_token(model, BLOCK) * BATCH * BLOCK == counter.get_total_flops()


def test_the_peak_is_the_fastest_product_measured_once_for_a_process(monkeypatch):
    seconds = iter([9.0, 0.2, 0.1, 0.4, 9.0, 9.0])
    monkeypatch.setattr(machine, "multiply", lambda *matrices: next(seconds))
    matmul_peak.cache_clear()
    try:
        peaks = [matmul_peak(torch.device("cpu"), "fp32") for _ in range(2)]
    finally:
        matmul_peak.cache_clear()

    # The first product is for warming up; the others end when they have taken a second.
    assert peaks == [2 * 512**3 / 0.1] * 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_measuring_draws_nothing_and_finds_a_number_of_operations(precision):
    before = torch.get_rng_state()

    peak = matmul_peak.__wrapped__(torch.device("cpu"), precision)

    assert torch.equal(torch.get_rng_state(), before)
    assert 1e8 < peak < 1e14  # between a very slow core and more than any CPU has


@pytest.mark.gpu
def test_measuring_on_a_gpu_is_not_counted_as_the_memory_of_the_run():
    peak = matmul_peak.__wrapped__(torch.device("cuda", torch.cuda.current_device()), "bf16")

    assert peak > 1e12
    assert torch.cuda.max_memory_allocated() < 100e6
