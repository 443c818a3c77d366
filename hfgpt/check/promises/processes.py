"""Promises about a model that two processes share: tensor parallelism and FSDP2, on CPUs by gloo."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from hfgpt.check.learning import ROUNDING, learn, relative_distance, worst_tensor
from hfgpt.check.promise import Finding, NotDone, at_most, close, holds, not_applicable, promise
from hfgpt.check.subject import Subject

TIMEOUT_SECONDS = 80


def import_path(model: PreTrainedModel) -> str:
    """`module:Class` of a class that another process can import; empty for code that came with the weights."""
    kind = type(model)
    return "" if kind.__module__.startswith("transformers_modules") else f"{kind.__module__}:{kind.__qualname__}"


def run_two_processes(subject: Subject, kind: str, ids: torch.Tensor) -> dict[str, Any] | str:
    """What two processes saw of the subject split by `kind`; or the line with which they ended."""
    model = subject.make()
    with TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder)
        torch.save(ids, folder / "ids.pt")
        (folder / "class.txt").write_text(import_path(model))
        program = Path(__file__).parents[1] / "two_processes.py"
        arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", program, folder, kind]
        path = os.pathsep.join(each or os.getcwd() for each in sys.path)
        launched = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            said = launched.communicate(timeout=TIMEOUT_SECONDS)[1]
        except subprocess.TimeoutExpired:
            launched.terminate()  # and it ends its two processes, which `kill` would leave behind
            launched.communicate()
            raise NotDone(
                f"not done after {TIMEOUT_SECONDS} s: the machine is slow, or one process waits for the other"
            ) from None
        if launched.returncode == 0:
            return torch.load(folder / f"seen-{kind}.pt")
        lines = [line.strip() for line in said.splitlines() if "Error: " in line and "ChildFailed" not in line]
        return lines[0] if lines else said.strip()[-300:]


def compare_with_one_process(subject: Subject, kind: str) -> Finding:
    """Logits and gradients of two processes beside those of one."""
    model, ids = subject.make(), subject.ids(2, 16)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    expected = learn(model, {"input_ids": ids, "labels": ids, "use_cache": False})
    seen = run_two_processes(subject, kind, ids)
    if isinstance(seen, str):
        return holds(False, seen)
    if not seen["split"]:
        return holds(False, "no parameter was split between the processes")
    of_logits = close(seen["logits"], logits, "logits")
    if of_logits.status == "fail":
        return of_logits
    note = f"gradients, most in {worst_tensor(seen['gradients'], expected)}; {seen['split']} tensors are split"
    return at_most(relative_distance(seen["gradients"], expected), ROUNDING, note)


@promise(
    "training",
    meaning="Split by its tensor-parallel plan between two processes, the model computes or learns something else.",
    usual_causes="a plan that names layers of another model; `colwise` layers not followed by `rowwise` ones; "
    "head counts read from the config instead of from the tensor's shape; a tied output layer without a rule.",
)
def tensor_parallel_is_one_process(subject: Subject) -> Finding:
    """`from_pretrained` with `DistributedConfig(tp_size=2)` on two processes has one's logits and gradients."""
    model = subject.make()
    if not (getattr(model, "_tp_plan", None) or getattr(model.config, "base_model_tp_plan", None)):
        return not_applicable("the class has no tensor-parallel plan")
    return compare_with_one_process(subject, "tensor")


@promise(
    "training",
    meaning="With its parameters sharded between two processes (FSDP2), the model computes or learns something else.",
    usual_causes="an FSDP plan that names layers of another model; a forward pass that reads a layer's weight without "
    "calling the layer.",
)
def fsdp_is_one_process(subject: Subject) -> Finding:
    """`from_pretrained` with `DistributedConfig(fsdp_size=2)`, each process with half of the rows, is one process."""
    model = subject.make()
    if not (getattr(model, "_fsdp_plan", None) or getattr(model.config, "base_model_fsdp_plan", None)):
        return not_applicable("the class has no FSDP plan")
    return compare_with_one_process(subject, "fsdp")
