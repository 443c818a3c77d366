"""What each of two processes does for test_parallel.py: `python -m torch.distributed.run … two_processes.py FOLDER`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from hfgpt import HFGPTForCausalLM

KINDS = {
    "tensor": DistributedConfig(tp_size=2),
    "fsdp": DistributedConfig(fsdp_size=2),
    "pipeline": DistributedConfig(pp_size=2),
}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def look_at(kind, folder, ids):
    model = HFGPTForCausalLM.from_pretrained(folder, distributed_config=KINDS[kind]).eval()
    # Before the first pass: FSDP keeps some parameters whole after it.
    shapes = {
        name: tuple(each.to_local().shape) for name, each in model.named_parameters() if isinstance(each, DTensor)
    }
    with torch.no_grad():
        seen = {
            "logits": whole(model(ids).logits),
            "packed": whole(model(ids, position_ids=torch.arange(20).remainder(8)[None].expand(2, -1)).logits),
            "text": model.generate(ids, max_new_tokens=8, do_sample=False),
            "shapes": shapes,
            "units": [name for name, module in model.named_modules() if isinstance(module, FSDPModule)],
        }
    if kind == "pipeline":
        return seen  # transformers runs it forward only
    rows = ids[[dist.get_rank()]] if kind == "fsdp" else ids
    model(rows, labels=rows).loss.backward()
    seen["gradients"] = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    model.save_pretrained(folder / kind)
    return seen


folder = Path(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo")
ids = torch.load(folder / "ids.pt")
seen = {kind: look_at(kind, folder, ids) for kind in KINDS}
if dist.get_rank() == 0:
    torch.save(seen, folder / "seen.pt")
dist.barrier()
dist.destroy_process_group()
