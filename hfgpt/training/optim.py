"""Optimizers, decay groups and schedules: one place, used by both loops."""

from collections.abc import Callable

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from hfgpt.config.schema import OptimConfig


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split the trainable parameters into those that decay and those that never do.

    Matrices and embeddings decay; vectors, which are the biases and the gains of the norms, do not.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, config: OptimConfig) -> Optimizer:
    """AdamW in torch's fused form, which walks each tensor once.

    Source:
        Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", https://arxiv.org/abs/1711.05101
    """
    first, second = config.betas
    groups = decay_groups(model, config.weight_decay)
    return AdamW(groups, lr=config.learning_rate, betas=(first, second), fused=True)


OPTIMIZERS: dict[str, Callable[[nn.Module, OptimConfig], Optimizer]] = {"adamw": adamw}

# Our names and transformers'. All rise linearly from 0 over `warmup_steps`; all but constant then fall to 0: cosine and
# linear at once, wsd in a line over the last `decay_share` of the run.
SCHEDULES = {
    "constant": "constant_with_warmup",
    "cosine": "cosine",
    "linear": "linear",
    "wsd": "warmup_stable_decay",
}


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer that a recipe names."""
    return OPTIMIZERS[config.name](model, config)


def make_schedule(optimizer: Optimizer, config: OptimConfig, total_steps: int) -> LambdaLR:
    """Build the schedule that a recipe names, one call of `step()` per optimizer step.

    Args:
        optimizer: whose learning rate it sets.
        config: name of the schedule, and its warmup in steps, at most those of the run, and the share of its decay.
        total_steps: optimizer steps of the whole run.
    """
    assert config.warmup_steps <= total_steps
    options = None
    if config.schedule == "wsd":
        decay_steps = min(round(config.decay_share * total_steps), total_steps - config.warmup_steps)
        options = {"num_decay_steps": decay_steps, "decay_type": "linear"}
    return get_scheduler(
        SCHEDULES[config.schedule], optimizer, config.warmup_steps, total_steps, scheduler_specific_kwargs=options
    )
