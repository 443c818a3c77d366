"""`hfgpt` where something is not as usual, in a process of a launch.

PRETEND_GPUS: accelerate takes CPUs for GPUs, so that it splits models as it does there.
POISONED_STEP: a step whose gradients are not finite.
KILLED_AT_PART: so many parts of the rows are scored at the end, of four rows each, when the last process is killed.
"""

import os
import signal

import torch
from accelerate.state import DistributedType, PartialState

from hfgpt.cli import main
from hfgpt.training import evaluate, run

make_model = run.make_model


def poisoned_model(*arguments):
    model, step = make_model(*arguments), int(os.environ["POISONED_STEP"])
    seen = []  # batches of training, when each is given for the first time

    def look(module, args, kwargs):
        if module.training and not any(torch.equal(kwargs["input_ids"], each) for each in seen):
            seen.append(kwargs["input_ids"])
        module.is_poisoned = len(seen) >= step and torch.equal(kwargs["input_ids"], seen[step - 1])

    def overflow(module, args, output):
        return output * torch.inf if model.training and model.is_poisoned else output

    model.register_forward_pre_hook(look, with_kwargs=True)
    model.model.layers[1].mlp.register_forward_hook(overflow)
    return model


def killed_at_part(scores, *part):
    add(scores, *part)
    process = PartialState()
    is_final = scores.step == int(os.environ.get("FINAL_STEP", "40"))
    if is_final and len(scores.scores) == int(os.environ["KILLED_AT_PART"]) and process.is_last_process:
        os.kill(os.getpid(), signal.SIGKILL)


if "KILLED_AT_PART" in os.environ:
    add, evaluate.PartialScores.add, evaluate.PART_ROWS = evaluate.PartialScores.add, killed_at_part, 4
if "POISONED_STEP" in os.environ:
    run.make_model = poisoned_model
if "PRETEND_GPUS" in os.environ:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *arguments, **names: ("gloo", DistributedType.MULTI_GPU)

if __name__ == "__main__":
    main()
