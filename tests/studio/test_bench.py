"""The benchmark with real workers, at a tiny size. Nothing here looks at how fast anything is."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from hfgpt.studio.bench import bench
from hfgpt.studio.job import make_job
from hfgpt.studio.report import render
from hfgpt.studio.sides import LLMsFromScratch, as_fast, parameters_of, write_weights
from hfgpt.studio.work import make_batches
from hfgpt.weights import load

NANOGPT = Path(__file__).with_name("nanogpt")
SHORT = {"size": "tiny", "device": "cpu", "rounds": 2, "steps": 1}


def assert_measured(report, sides):
    """Every side has its turns, and hfgpt its ratio to every other."""
    assert [*report["sides"]] == ["hfgpt", *sides]
    for side in report["sides"].values():
        assert len(side["seconds"]) == len(side["cpu_seconds"]) == report["rounds"]
        assert min(side["seconds"]) <= side["median_seconds"] <= max(side["seconds"])
        assert side["units_per_second"] > 0
        assert side["peak_bytes"] >= 0
    for ratio in report["ratios"].values():
        for kind in ("wall", "cpu"):
            assert 0 < ratio[kind]["min"] <= ratio[kind]["median"] <= ratio[kind]["max"]
    assert report == json.loads(json.dumps(report))
    assert {"flops", "bytes"} == {*report["peaks"]}
    assert {"torch", "transformers", "device", "commit"} <= {*report["environment"]}
    assert report["load_before"] >= 0
    assert 0 <= report["cpu_share_of_others"]


@pytest.mark.slow
def test_training_is_measured_beside_every_peer_that_trains():
    peers = f"transformers,nanogpt={NANOGPT},hfgpt-train,trainer"

    report = bench(make_job("train", peers, **SHORT))

    others = ["transformers", "nanogpt", "hfgpt-train", "trainer"]
    assert_measured(report, others)
    assert [*report["ratios"]] == others
    assert {name: [*ratios] for name, ratios in report["ratios_of_runs"].items()} == {
        "hfgpt-train": ["transformers", "nanogpt"],
        "trainer": ["transformers", "nanogpt"],
    }
    assert 0 < report["difference"]["transformers"] < 3e-5  # of sums in another order
    assert 0 < report["difference"]["nanogpt"] < 3e-5
    assert all(side["share_of_matmul_peak"] > 0 for side in report["sides"].values())
    shown = render(report)
    for name in others:
        assert re.search(rf"hfgpt is [\d.]+ x \([\d.]+\.\.[\d.]+; CPU time [\d.]+ x\) as fast as {name}$", shown, re.M)


@pytest.mark.parametrize(
    ("command", "peers", "changes"),
    [
        pytest.param("evaluate", f"transformers,nanogpt={NANOGPT}", {"precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param(
            "generate",
            f"transformers,transformers-static,nanogpt={NANOGPT}",
            {"new_tokens": 4, "batch_size": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param("generate", "transformers", {"new_tokens": 4, "top_k": 5}, marks=pytest.mark.slow),
        ("load", "transformers", {"allocator": "keep"}),
        pytest.param("evaluate", f"transformers,nanogpt={NANOGPT}", {"stride": 5}, marks=pytest.mark.slow),
        pytest.param("data", "transformers", {"megabytes": 0.05, "processes": 2}, marks=pytest.mark.slow),
    ],
)
def test_every_other_command_is_measured_beside_its_peers(command, peers, changes):
    report = bench(make_job(command, peers, **SHORT, **changes))

    names = [word.partition("=")[0] for word in peers.split(",")]
    same = ["transformers (keep)"] if "allocator" in changes else []
    assert_measured(report, names + same)
    assert {*report["difference"]} == {*names}
    assert [*report["ratios_same_allocator"]] == (["transformers"] if same else [])
    assert all(found == 0 for found in report["difference"].values()) or command == "evaluate" or "top_k" in changes
    assert (report["sides"]["hfgpt"]["share_of_bandwidth"] is None) == (command in ("evaluate", "data"))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"compile": True}, {"precision": "bf16"}])
def test_a_compiled_step_or_one_in_bf16_is_compared_with_the_plain_one_and_measured(changes):
    report = bench(make_job("train", "transformers", **SHORT, **changes))

    assert_measured(report, ["transformers"])


def write_other_nanogpt(folder, old, new):
    code = (NANOGPT / "model.py").read_text()
    assert old in code
    (folder / "model.py").write_text(code.replace(old, new))
    return f"nanogpt={folder}"


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("train", "IS_CAUSAL = True", "IS_CAUSAL = False"),
        ("train", "F.gelu(self.c_fc(x))", 'F.gelu(self.c_fc(x), approximate="tanh")'),
        ("train", "ignore_index=-1)", 'ignore_index=-1, reduction="sum")'),
        ("generate", "argmax(-1", "argmin(-1"),
    ],
)
def test_a_peer_that_computes_something_else_is_refused_before_anything_is_timed(tmp_path, capfd, command, old, new):
    peer = write_other_nanogpt(tmp_path, old, new)

    with pytest.raises(ValueError, match=r"hfgpt and nanogpt do not compute the same: .* differs by") as refused:
        bench(make_job(command, peer, **SHORT))

    assert "\n" not in str(refused.value)
    assert "warming up" not in capfd.readouterr().err


def test_a_checkout_that_is_something_else_is_refused(tmp_path):
    peer = write_other_nanogpt(tmp_path, "class GPTConfig", "class Settings")

    with pytest.raises(ValueError, match="has no `GPTConfig`: this is not nanoGPT"):
        bench(make_job("train", peer, **SHORT))


def test_one_row_keeps_its_tokens_where_only_its_end_is_scored():
    job = make_job("evaluate", "transformers", **{**SHORT, "batch_size": 1}, stride=5)

    for inputs, targets in make_batches(job):
        assert (inputs >= 0).all()
        assert torch.equal(targets[:, -5:-1], inputs[:, -4:])
        assert (targets[:, :-5] == -100).all()


def test_a_stride_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"`--stride` \(33\) is longer than a row \(`--block-size`, 32\)"):
        make_job("evaluate", "transformers", **SHORT, stride=33)


def test_weights_of_llms_from_scratch_are_the_same_in_its_faster_model(tmp_path):
    job, file = make_job("load", "transformers", **SHORT), tmp_path / "model.pth"
    write_weights(job, file, LLMsFromScratch.format, "gelu_new", 320)
    tensors = torch.load(file, weights_only=True)
    torch.save(as_fast(tensors), tmp_path / "fast.pth")

    slow, fast = (parameters_of(load(path, heads=4)) for path in (file, tmp_path / "fast.pth"))

    assert "trf_blocks.0.att.qkv.bias" in as_fast(tensors)
    assert slow.keys() == fast.keys()
    assert all(torch.equal(slow[name], fast[name]) for name in slow)


def test_a_worker_that_is_killed_is_reported_in_one_line_and_takes_the_others_along(tmp_path):
    words = ["bench", "evaluate", "--size", "tiny", "--device", "cpu", "--steps", "1000000"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "hfgpt", *words]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as driver:
        try:
            assert any("warming up" in line for line in driver.stderr)
            workers = psutil.Process(driver.pid).children()
            workers[0].kill()
            said = driver.stderr.read()
            driver.wait()
        finally:
            driver.terminate()

    assert len(workers) == 2
    assert driver.returncode == 1
    assert said.splitlines()[-1] == "error: the worker of hfgpt was ended by SIGKILL."
    assert "Traceback" not in said
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in workers)
