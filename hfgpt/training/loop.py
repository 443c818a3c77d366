"""The training loop, on accelerate: from the first batch to the last.

trainer.py takes the same steps through transformers' Trainer, bit for bit. Both call `TrainingControl` (control.py) for
what happens around a step: order of the data, resuming, logging, evaluating, saving, stopping.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hfgpt.distributed.launch import make_accelerator
from hfgpt.distributed.sharding import exchange_gradients, full_tensor, prepare
from hfgpt.training.control import MicroBatches, TrainingControl
from hfgpt.training.optim import make_optimizer, make_schedule
from hfgpt.training.run import Run


def run_loop(run: Run, control: TrainingControl) -> None:
    """Train `run.model` in place, until training is over.

    Raises:
        Stopped: a stop was asked for; there is a checkpoint of the last step.
    """
    config = run.config
    accelerator = make_accelerator(config, run.is_compiled)
    loader = run.train_loader()
    model, optimizer = prepare(accelerator, run.model, make_optimizer(run.model, run.optim))
    schedule = make_schedule(optimizer, run.optim, run.total_steps)
    control.set_up(accelerator, model, optimizer, schedule)

    model.train()
    for micro_batches in control.steps(loader):  # those of one optimizer step, epoch after epoch
        micro_batches, targets = control.begin_step(micro_batches)  # on the device; counted over all processes
        loss = backward(accelerator, model, micro_batches, targets)
        grad_norm = clip(accelerator, model, config.optim.max_grad_norm)
        if not control.should_step(grad_norm, loss):  # the gradients are not finite, and the recipe says to skip
            optimizer.zero_grad()  # without gradients a step leaves the weights and the optimizer as they are
        optimizer.step()
        if not accelerator.optimizer_step_was_skipped:  # fp16 skips a step whose gradients overflowed
            schedule.step()
        optimizer.zero_grad()
        control.end_step()  # log, evaluate, save and stop, where that is due


def backward(accelerator: Accelerator, model: nn.Module, micro_batches: MicroBatches, targets: Any) -> Tensor:
    """Run forward and backward passes of a step; processes exchange gradients with its last micro-batch.

    Args:
        accelerator: of this process.
        model: prepared by it.
        micro_batches: of this process, from `hfgpt.data.loaders.collate`, on its device.
        targets: in the whole step, over all processes.

    Returns:
        The loss, nats per token; its mean over the processes is the mean over all targets of the step.
    """
    step_loss = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(micro_batches, start=1):
        with exchange_gradients(accelerator, model, is_last=number == len(micro_batches)):
            # Each loss is a sum divided by `num_items_in_batch`, all targets of the step, so that the losses add up to
            # the mean however unequal the micro-batches are. DDP and FSDP average over processes: the factor undoes it.
            loss = model(**batch, num_items_in_batch=targets, skip_logits=True).loss * accelerator.num_processes
            accelerator.backward(loss)
        step_loss += loss.detach()
    return step_loss


def clip(accelerator: Accelerator, model: nn.Module, max_grad_norm: float) -> Tensor:
    """Scale the gradients down to `max_grad_norm`, or, where that is 0, leave them; returns their norm before."""
    return full_tensor(accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf")))
