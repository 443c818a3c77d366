"""What a person needs to know of a machine before a run: versions, devices, memory, what is missing, and known traps.

Nothing is downloaded, changed or sent; of a token only whether there is one.
"""

import importlib.metadata
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from accelerate.commands.config.config_args import default_config_file
from huggingface_hub import constants, get_token
from packaging.requirements import Requirement

from hfgpt.system.console import align_columns
from hfgpt.system.extras import extras, install_command, requirements
from hfgpt.system.fonts import PACKAGES, fonts_of_scripts
from hfgpt.system.machine import cpu_name, environment, matmul_peak

EXTRAS = {
    "trackers": "TensorBoard and trackio, for `train.trackers`",
    "deepspeed": "DeepSpeed, for `accelerate launch --use_deepspeed`",
    "neighbours": "PEFT, TRL and lm-eval, which hfgpt's models work with",
    "openai": "the checksums of OpenAI's TensorFlow checkpoints, for `hfgpt convert`",
    "gguf": "files for llama.cpp, for `hfgpt convert`",
    "onnx": "ONNX graphs, for `hfgpt convert`",
    "lecture": "GPT-2's vocabulary, for a lecture without a network",
    "test": "the checks of `make test`, which installs them",
}
"""What each extra of hfgpt's package brings; others are listed without words."""

LITTLE_DISK_BYTES = 2_000_000_000
LITTLE_MEMORY_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Finding:
    """What a person should know, and what to do."""

    is_fault: bool
    """Whether a run cannot work, or not as its recipe says; otherwise this is a hint."""
    text: str


def examine(folder: Path) -> dict[str, Any]:
    """Look at this machine.

    Args:
        folder: where runs would be left; its disk is looked at.

    Returns:
        What is there, by section, and `findings`: a list of dictionaries with `is_fault` and `text`.
    """
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(folder)
    report = {
        "versions": {name: value for name, value in environment().items() if name not in ("device", "cpu_count")},
        "devices": devices(),
        "memory": {"total_bytes": memory.total, "available_bytes": memory.available},
        "disk": {"total_bytes": disk.total, "free_bytes": disk.free},
        "extras": {name: missing_packages(name) for name in extras()},
        "hub": {
            "has_token": get_token() is not None,
            "is_offline": constants.is_offline_mode(),
            "cache_is_writable": is_writable(Path(constants.HF_HUB_CACHE)),
        },
        "fonts": fonts_of_scripts(),
        "accelerate": accelerate_config(),
    }
    return {**report, "findings": [asdict(finding) for finding in findings(report)]}


def devices() -> dict[str, Any]:
    """CPU and accelerators, and how fast the one that a run would take multiplies fp32 matrices."""
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append({"name": properties.name, "memory_bytes": properties.total_memory})
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = accelerator or torch.device("cpu")
    return {
        "used": device.type,
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "usable_cpu_count": usable_cpus(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "matmul_peak_fp32": matmul_peak(device, "fp32"),
    }


def usable_cpus() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def missing_packages(extra: str | None) -> list[str]:
    """Requirements of an extra (None: of hfgpt itself) that are not met, as `name range`."""
    return [f"{each.name}{each.specifier}" for each in requirements(extra) if not is_met(each)]


def is_met(requirement: Requirement) -> bool:
    """Whether a package is installed in a version that is allowed."""
    try:
        return requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder itself if it is not there."""
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)


def accelerate_config() -> dict[str, Any] | None:
    """What `accelerate config` has left as the default of `accelerate launch`, or None."""
    path = Path(default_config_file)
    if not path.is_file():
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        return {"is_readable": False}
    names = ("distributed_type", "num_processes", "num_machines", "mixed_precision", "use_cpu")
    return {"is_readable": True, **{name: content.get(name) for name in names}}


def findings(report: dict[str, Any]) -> list[Finding]:
    """The known traps on this machine, faults first."""
    faults = [f"{package} is needed and not installed in that version." for package in missing_packages(None)]
    hints = []
    if not report["hub"]["cache_is_writable"]:
        faults.append("the cache of the Hub cannot be written: set HF_HOME to a folder that can.")
    free_disk, free_memory = report["disk"]["free_bytes"], report["memory"]["available_bytes"]
    if free_disk < LITTLE_DISK_BYTES:
        hints.append(f"the disk has {gigabytes(free_disk)} left: few checkpoints fit.")
    if free_memory < LITTLE_MEMORY_BYTES:
        hints.append(f"{gigabytes(free_memory)} of memory are free: a GPT-2 of 124M takes about 2 GB to train.")
    if report["hub"]["is_offline"]:
        hints.append("HF_HUB_OFFLINE is set: models and data sets come from the cache only.")
    elif not report["hub"]["has_token"]:
        hints.append("no token for the Hub: reading is fine, `hfgpt push` needs `hf auth login`.")
    if report["fonts"]["Korean"] is None:
        hints.append(f"pictures show numbers for Korean letters, no font here has them: install {PACKAGES['HANGUL']}.")
    found = device_findings(report["devices"]) + accelerate_findings(report["accelerate"], report["devices"])
    found += [Finding(True, text) for text in faults] + [Finding(False, text) for text in hints]
    return sorted(found, key=lambda finding: not finding.is_fault)


def device_findings(seen: dict[str, Any]) -> list[Finding]:
    """Traps between torch and the machine's processors."""
    found, threads, cores = [], seen["threads"], seen["usable_cpu_count"]
    if shutil.which("nvidia-smi") and not seen["gpus"]:
        if torch.version.cuda is None:
            text = f"there is an NVIDIA driver, but torch {torch.__version__} has no CUDA: install torch's CUDA build."
        else:
            text = "there is an NVIDIA driver, but torch sees no GPU: look at CUDA_VISIBLE_DEVICES and `nvidia-smi`."
        found.append(Finding(True, text))
    if not seen["gpus"] and seen["used"] == "cpu" and threads < cores:
        found.append(Finding(False, f"torch uses {threads} of {cores} cores: OMP_NUM_THREADS may be set."))
    if threads > cores:
        text = f"torch uses {threads} threads on {cores} cores, which is slow: set OMP_NUM_THREADS={cores}."
        found.append(Finding(False, text))
    return found


def accelerate_findings(config: dict[str, Any] | None, seen: dict[str, Any]) -> list[Finding]:
    """Traps in the default config of `accelerate launch`."""
    if config is None:
        return []
    if not config["is_readable"]:
        return [Finding(True, "the default config of accelerate cannot be read: run `accelerate config` again.")]
    kind, processes = str(config["distributed_type"]), config["num_processes"] or 1
    asks, gpus = f"the default config of accelerate asks for {processes} processes", len(seen["gpus"])
    if kind == "MULTI_CPU" or (config["use_cpu"] and processes > 1 and kind != "MULTI_GPU"):
        way = "use ACCELERATE_USE_CPU=true and `--multi_gpu`, as the README does."
        return [Finding(True, f"{asks} on a CPU, and accelerate would start one: {way}")]
    if kind in ("MULTI_GPU", "FSDP", "DEEPSPEED") and not config["use_cpu"] and processes > max(1, gpus):
        return [Finding(True, f"{asks} ({kind}), and there are {gpus} GPUs here: run `accelerate config` again.")]
    return []


def render(report: dict[str, Any]) -> str:
    """The report as lines to read."""
    seen, hub, accelerate = report["devices"], report["hub"], report["accelerate"]
    memory, disk = report["memory"], report["disk"]
    default = {name: value for name, value in (accelerate or {}).items() if name != "is_readable"}
    rows = [
        ("versions", ", ".join(f"{name} {value}" for name, value in report["versions"].items() if value is not None)),
        ("cpu", f"{seen['cpu']}; {seen['usable_cpu_count']} of {seen['cpu_count']} cores, {seen['threads']} threads"),
        ("gpu", ", ".join(f"{gpu['name']} ({gigabytes(gpu['memory_bytes'])})" for gpu in seen["gpus"]) or "none"),
        ("runs use", f"{seen['used']}, measured {seen['matmul_peak_fp32'] / 1e9:,.0f} GFLOP/s in fp32 matrix products"),
        ("memory", f"{gigabytes(memory['available_bytes'])} of {gigabytes(memory['total_bytes'])} free"),
        ("disk", f"{gigabytes(disk['free_bytes'])} of {gigabytes(disk['total_bytes'])} free"),
        ("fonts", ", ".join(f"{script}: {font or 'none'}" for script, font in report["fonts"].items())),
        ("Hub", ("a token is set" if hub["has_token"] else "no token") + (", offline" if hub["is_offline"] else "")),
        (
            "accelerate",
            "no default config"
            if accelerate is None
            else ", ".join(f"{name} {value}" for name, value in default.items()),
        ),
    ]
    for name, missing in report["extras"].items():
        state = "installed" if not missing else "not here"
        if missing and name != "test":
            state += f": `{install_command(missing)}`"
        rows.append((f"[{name}]", f"{state}  ({EXTRAS.get(name, 'more')})"))
    rows += [("FAULT" if finding["is_fault"] else "hint", finding["text"]) for finding in report["findings"]]
    return align_columns(rows)


def gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB"
