"""A saved model opened by a process that cannot import the package of its class.

Run as a program, this file is that process; it imports nothing of hfgpt.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

LIMIT_SECONDS = 100


def load_alone(folder: Path, package: str, ids: Tensor) -> Tensor | str:
    """Logits of `ids` (B, T) from a folder, by the code in it alone: (B, T, V), or one line about what went wrong.

    Args:
        folder: of a saved model.
        package: what the process may not import. The classes of a folder's code have none.
        ids: on which it is run.

    Raises:
        subprocess.TimeoutExpired: after `LIMIT_SECONDS`.
    """
    torch.save(ids, folder / "ids.pt")
    # -I: neither the current folder nor PYTHONPATH, so that nothing but installed packages is found.
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", __file__, str(folder), package],
        env=os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        return next(reversed(done.stderr.strip().splitlines()), f"the process ended with {done.returncode}")
    return torch.load(folder / "logits.pt")


class Blocked:
    """Finds nothing in one package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(folder: str, package: str) -> None:
    """Load, after it was refused without trust, and write the logits."""
    if package not in ("transformers", "transformers_modules"):
        sys.meta_path.insert(0, Blocked(package))
    from transformers import AutoModelForCausalLM

    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
    else:
        raise RuntimeError("the code in the folder ran though it was not trusted")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(model(torch.load(f"{folder}/ids.pt")).logits, f"{folder}/logits.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
