"""`hfgpt`, with a gradient that is not finite in the third step, or in that which POISONED_STEP says."""

import os

import torch

from hfgpt import run
from hfgpt.cli import main

make_model = run.make_model
STEP = int(os.environ.get("POISONED_STEP", "3"))
seen = []  # batches of training, the first time that each is given


def poisoned_model(*arguments):
    model = make_model(*arguments)

    def look(module, args, kwargs):
        if module.training and not any(torch.equal(kwargs["input_ids"], each) for each in seen):
            seen.append(kwargs["input_ids"])
        module.is_poisoned = len(seen) >= STEP and torch.equal(kwargs["input_ids"], seen[STEP - 1])

    def overflow(module, args, output):
        return output * torch.inf if model.training and model.is_poisoned else output

    model.register_forward_pre_hook(look, with_kwargs=True)
    model.model.layers[1].mlp.register_forward_hook(overflow)
    return model


run.make_model = poisoned_model

if __name__ == "__main__":
    main()
