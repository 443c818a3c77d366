"""What the doctor says of this machine is true, and it knows the traps, and it keeps secrets."""

import json
import os
import shutil
from importlib.metadata import version

import pytest
import torch

from hfgpt.system import doctor
from hfgpt.system.doctor import (
    Finding,
    accelerate_config,
    accelerate_findings,
    device_findings,
    examine,
    findings,
    missing_packages,
    render,
)
from hfgpt.system.extras import extras

TOKEN = "hf_canaryCanaryCanaryCanaryCanary12"
CPU = {"used": "cpu", "gpus": [], "threads": 2, "usable_cpu_count": 2}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return examine(tmp_path_factory.mktemp("here"))


def test_the_report_is_true_of_this_machine(report, tmp_path):
    assert report["versions"]["torch"] == version("torch")
    assert report["devices"]["threads"] == torch.get_num_threads()
    assert report["devices"]["usable_cpu_count"] == len(os.sched_getaffinity(0))
    assert len(report["devices"]["gpus"]) == torch.cuda.device_count()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert report["memory"]["total_bytes"] == total > report["memory"]["available_bytes"] > 0
    assert report["disk"]["total_bytes"] == shutil.disk_usage(tmp_path).total
    assert set(report["extras"]) == set(doctor.EXTRAS)
    assert json.loads(json.dumps(report)) == report


def test_the_report_can_be_read(report):
    text = render(report)

    assert f"torch {version('torch')}" in text
    assert all(f"[{name}]" in text for name in doctor.EXTRAS)
    assert "GFLOP/s in fp32" in text
    assert max(map(len, text.splitlines())) < 400


@pytest.mark.parametrize("is_set", [True, False])
def test_a_token_is_seen_and_never_shown(tmp_path, monkeypatch, is_set):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    if is_set:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    else:
        monkeypatch.delenv("HF_TOKEN", raising=False)

    seen = examine(tmp_path)

    assert seen["hub"]["has_token"] == is_set
    assert ("no token" in render(seen)) == (not is_set)
    assert TOKEN not in json.dumps(seen) + render(seen)


def test_extras_that_are_missing_are_listed_with_what_is_wanted(monkeypatch):
    installed = doctor.is_met
    assert all(missing_packages(name) == [] for name in [None, *extras()])  # `make test` installs them all

    monkeypatch.setattr(doctor, "is_met", lambda needed: needed.name != "trackio" and installed(needed))

    assert missing_packages("trackers") == ["trackio>=0.43"]
    assert missing_packages("gguf") == missing_packages(None) == []


def test_a_package_of_an_older_version_than_needed_is_a_fault(report, monkeypatch):
    from packaging.requirements import Requirement

    assert doctor.is_met(Requirement("torch>=2.0"))
    assert not doctor.is_met(Requirement("torch>=99"))
    assert not doctor.is_met(Requirement("no-such-package-anywhere"))
    monkeypatch.setattr(doctor, "is_met", lambda needed: needed.name != "accelerate")

    assert Finding(True, "accelerate>=1.12 is needed and not installed in that version.") in findings(report)


def test_an_nvidia_driver_beside_a_torch_without_cuda_is_a_fault(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", None)

    (finding,) = device_findings(CPU)

    assert finding.is_fault
    assert "has no CUDA" in finding.text
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "CUDA_VISIBLE_DEVICES" in device_findings(CPU)[0].text
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert device_findings(CPU) == []


@pytest.mark.parametrize(("threads", "words"), [(1, "torch uses 1 of 2 cores"), (8, "set OMP_NUM_THREADS=2")])
def test_a_wrong_number_of_threads_is_a_hint(monkeypatch, tmp_path, threads, words):
    monkeypatch.setenv("PATH", str(tmp_path))

    (finding,) = device_findings({**CPU, "threads": threads})

    assert not finding.is_fault
    assert words in finding.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n", "accelerate would start one"),
        ("distributed_type: MULTI_GPU\nnum_processes: 8\nuse_cpu: false\n", "there are 0 GPUs here"),
        ("distributed_type: 'NO'\nnum_processes: 1\nuse_cpu: false\n", None),
        ("distributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: true\n", None),
        ("just text", "cannot be read"),
        ("a: [", "cannot be read"),
        (None, None),
    ],
)
def test_a_config_of_accelerate_that_would_not_do_what_it_says_is_a_fault(tmp_path, monkeypatch, content, words):
    path = tmp_path / "default_config.yaml"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(doctor, "default_config_file", str(path))

    found = accelerate_findings(accelerate_config(), CPU)

    assert [finding.is_fault for finding in found] == ([] if words is None else [True])
    assert words is None or words in found[0].text


def test_little_room_is_a_hint_and_faults_come_first(report, monkeypatch):
    monkeypatch.setattr(doctor, "is_met", lambda needed: needed.name != "accelerate")

    found = findings(
        {
            **report,
            "disk": {"total_bytes": 10**12, "free_bytes": 10**9},
            "memory": {"total_bytes": 10**12, "available_bytes": 10**9},
            "hub": {"has_token": True, "is_offline": True, "cache_is_writable": False},
        }
    )

    texts = " ".join(finding.text for finding in found)
    assert "the disk has 1.0 GB left" in texts
    assert "1.0 GB of memory are free" in texts
    assert "set HF_HOME" in texts
    assert "HF_HUB_OFFLINE is set" in texts
    assert [finding.is_fault for finding in found] == sorted((f.is_fault for f in found), reverse=True)
