"""What each of two processes does for processes.py: `python -m torch.distributed.run … two_processes.py FOLDER KIND`.

FOLDER holds a saved model, `ids.pt` and `class.txt`: where the model's class is imported from, or nothing for the class
that AutoModelForCausalLM finds. `seen-KIND.pt` is left there: logits, gradients, and how
many tensors were split.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

KINDS = {"tensor": {"tp_size": 2}, "fsdp": {"fsdp_size": 2}}


def full_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load(folder: Path, kind: str) -> Any:
    """The model in `folder`, split between the processes."""
    settings: dict[str, Any] = {"distributed_config": DistributedConfig(**KINDS[kind])}
    module, _, name = (folder / "class.txt").read_text().partition(":")
    if not module:
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings)
    return getattr(importlib.import_module(module), name).from_pretrained(folder, **settings)


def look_at(folder: Path, kind: str) -> dict[str, Any]:
    """Logits of the whole batch, and the gradients of its loss; with FSDP each process has half of the rows."""
    ids = torch.load(folder / "ids.pt")
    model = load(folder, kind).eval()
    split = sum(isinstance(each, DTensor) for each in model.parameters())
    with torch.no_grad():
        logits = full_tensor(model(input_ids=ids, use_cache=False).logits)
    rows = ids.chunk(2)[dist.get_rank()] if kind == "fsdp" else ids
    model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    gradients = {name: full_tensor(each.grad) for name, each in model.named_parameters() if each.grad is not None}
    return {"logits": logits, "gradients": gradients, "split": split}


def main(folder: Path, kind: str) -> None:
    """Load, look, and leave what was seen in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    seen = look_at(folder, kind)
    if dist.get_rank() == 0:
        torch.save(seen, folder / f"seen-{kind}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
