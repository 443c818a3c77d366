"""Is the folder the same model? Both sides run in processes of their own, and their logits are compared bit by bit."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ORIGINAL = """
import importlib, json, sys, torch
spec = json.load(open(sys.argv[1]))
sys.path[:0] = spec["path"]
home = importlib.import_module(spec["module"])
sys.path[:0] = [spec["code"]]
from gpt_call import Call, decode, as_dataclass, as_namespace, with_attributes
arguments = {name: decode(value) for name, value in spec["arguments"].items()}
direct = {name: arguments.pop(name) for name in spec["direct"]}
GPT = getattr(home, spec["class"])
if spec["settings"]:
    direct[spec["settings"]] = eval(spec["make"], {**vars(home), **globals()})
model = GPT(**direct)
model.load_state_dict(torch.load(spec["weights"], weights_only=True))
model.eval()
call = Call(spec["time_first"], spec["given"], tuple(spec["output"]))
with torch.no_grad():
    batches = torch.load(spec["ids"], weights_only=True)
    torch.save([call.logits(model, ids).contiguous() for ids in batches], spec["result"])
"""

FOLDER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
spec = json.load(open(sys.argv[1]))
model = AutoModelForCausalLM.from_pretrained(spec["folder"], trust_remote_code=True).eval()
with torch.no_grad():
    torch.save([model(ids).logits.contiguous() for ids in torch.load(spec["ids"], weights_only=True)], spec["result"])
"""


def run(script: str, spec: dict[str, Any], folder: Path, what: str) -> list[Tensor]:
    """What a script computes in a process of its own, in an empty folder.

    Raises:
        ValueError: it fails.
    """
    name = what.split()[1]
    spec = {**spec, "result": str(folder / f"{name}.pt")}
    (folder / f"{name}.json").write_text(json.dumps(spec), encoding="utf-8")
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder / f"{name}.json")],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"{what} failed in a process of its own: {last}")
    return torch.load(spec["result"], weights_only=True)


def compare(folder: Path, original: dict[str, Any], weights: dict[str, Tensor], batches: list[Tensor]) -> str:
    """Run both, and say what was found.

    Args:
        folder: that transformers loads.
        original: how the class is found and made, see `ORIGINAL`.
        weights: its state dict.
        batches: ids.

    Raises:
        ValueError: a logit differs.
    """
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        torch.save(weights, work / "weights.pt")
        torch.save(batches, work / "ids.pt")
        shared = {"ids": str(work / "ids.pt"), "weights": str(work / "weights.pt")}
        theirs = run(ORIGINAL, {**original, **shared}, work, "the class itself")
        ours = run(FOLDER, {"folder": str(folder.resolve()), **shared}, work, "the folder")
    for a, b in zip(theirs, ours, strict=True):
        if not torch.equal(a, b):
            difference = float((a.double() - b.double()).abs().max())
            raise ValueError(
                f"the folder's logits differ from the class's own by up to {difference:.2g}; nothing was written."
            )
    return f"{sum(each.numel() for each in theirs):,} logits are bit-equal to those of"
