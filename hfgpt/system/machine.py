"""The machine: how fast it multiplies matrices, how much memory a run took, and which versions produced a result."""

import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SECONDS, PRODUCTS, MOST_SECONDS = 0.1, 20, 1.0
"""Measure for at least so long and so many products, but no longer than `MOST_SECONDS`. The fastest one counts."""


def training_flops_per_token(model: PreTrainedModel, block_size: int) -> int:
    """Operations of the matrix products in one forward and backward pass, for each token: 6 N + 12 L C T.

    N counts the weights of the linear layers: the output layer, though it may be the embedding, and neither positions
    nor norms, which multiply no matrix. Attention counts as if every token saw all T of its row; what recomputing
    costs does not count.

    Args:
        model: with `config.num_hidden_layers` (L) and `config.hidden_size` (C).
        block_size: tokens in a row, T.

    Source:
        Chowdhery et al. 2022, "PaLM: Scaling Language Modeling with Pathways", appendix B,
        https://arxiv.org/abs/2204.02311
    """
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return 6 * weights + 12 * model.config.num_hidden_layers * model.config.hidden_size * block_size


@cache
def matmul_peak(device: torch.device, precision: str) -> float:
    """Operations per second of the fastest of some large matrix products, measured now and on this machine.

    Draws from a generator of its own. A process measures once.

    Args:
        device: to multiply on.
        precision: `fp32`, `bf16` or `fp16`.
    """
    size = 512 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)
    first, second = (
        torch.randn(size, size, generator=generator, device=device).to(DTYPES[precision]) for _ in range(2)
    )
    product = torch.empty_like(first)
    multiply(first, second, product)  # the first one also loads and chooses kernels
    taken = [multiply(first, second, product)]
    while sum(taken) < SECONDS or (len(taken) < PRODUCTS and sum(taken) < MOST_SECONDS):
        taken.append(multiply(first, second, product))
    del first, second, product
    if device.type == "cuda":  # these matrices are not the run's memory
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * size**3 / min(taken)


def multiply(first: torch.Tensor, second: torch.Tensor, product: torch.Tensor) -> float:
    """Seconds that one product takes."""
    wait(first.device)
    started_at = time.perf_counter()
    torch.mm(first, second, out=product)
    wait(first.device)
    return time.perf_counter() - started_at


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


PACKAGES = ("hfgpt", "torch", "transformers", "datasets", "accelerate", "tokenizers")


def environment() -> dict[str, Any]:
    """What produced a result: versions, platform, device, threads and commit. It is published: no names in it.

    `commit` is None when hfgpt does not run from its own git checkout, or git is not installed.
    """
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",  # no kernel release: some name their host
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": git_commit(Path(__file__).parents[2]),
    }


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux, where platform.processor() is empty or only the architecture
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def git_commit(root: Path) -> str | None:
    """The commit that is checked out in `root`, or None if `root` is not a git work tree of hfgpt itself."""
    pyproject = root / "pyproject.toml"
    if not (root / ".git").exists() or not pyproject.exists() or shutil.which("git") is None:
        return None
    if tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {}).get("name") != "hfgpt":
        return None
    # --git-dir: never the repository above or the one in GIT_DIR, which a git hook sets for its own.
    command = ["git", "--git-dir", str(root / ".git"), "rev-parse", "--verify", "HEAD"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None  # a repository without a commit has no HEAD


def peak_memory_bytes() -> int:
    """Largest memory so far: the tensors on the current CUDA device if there are any, else the whole process."""
    import resource  # Windows has none, and loading a model does not need it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    process_bytes = peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
    return torch.cuda.max_memory_allocated() or process_bytes  # 0 where CUDA is absent or was not used
