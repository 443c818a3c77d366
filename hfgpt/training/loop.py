"""The training loop, on accelerate: one story, from the first batch to the last.

hfgpt/training/trainer.py tells the same story through transformers' Trainer, step for step the same.
"""

from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, send_to_device

from hfgpt.data.loaders import start_at
from hfgpt.distributed.deepspeed import clear_overflow, deepspeed_plugin
from hfgpt.distributed.launch import PRECISIONS, configure_engine
from hfgpt.distributed.sharding import exchange_gradients, full_tensor, optimizer_state, prepare
from hfgpt.loss import IGNORE_INDEX
from hfgpt.training.checkpoint import TrainState, load_states, restore_random_states
from hfgpt.training.early_stopping import Verdict, judge
from hfgpt.training.evaluate import evaluate, is_due, is_evaluation_due, seed_training, stopped
from hfgpt.training.nonfinite import NonFiniteGuard
from hfgpt.training.optim import make_optimizer, make_schedule
from hfgpt.training.recorder import Recorder
from hfgpt.training.run import Run
from hfgpt.training.saving import is_checkpoint_due, save_checkpoint
from hfgpt.training.signals import StopRequest
from hfgpt.training.startup_checks import check_compiled


def run_loop(run: Run, recorder: Recorder, stop: StopRequest) -> TrainState:
    """Train.

    Args:
        run: from `open_run`; its model is trained in place.
        recorder: hears of every step.
        stop: looked at in every step.

    Returns:
        Where training ended.

    Raises:
        Stopped: a stop was asked for; there is a checkpoint of the last step.
    """
    config, position = run.config, run.position
    plugin = deepspeed_plugin(config, accumulation_steps=1)
    accelerator = Accelerator(
        mixed_precision=PRECISIONS[config.train.precision] if plugin is None else "no",
        deepspeed_plugin=plugin,
        dynamo_backend="inductor" if config.train.compile else "no",
        # Accumulation is done here; a launcher's variable must not divide the loss once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    configure_engine(accelerator)
    loader = run.train_loader()
    model, optimizer = prepare(accelerator, run.model, make_optimizer(run.model, config.optim))
    schedule = make_schedule(optimizer, config.optim, run.total_steps)
    states: dict[str, Any] = {"optimizer": optimizer_state(run.model, optimizer), "schedule": schedule}
    if accelerator.scaler is not None:
        states["scaler"] = accelerator.scaler
    seed_training(config)
    if run.resume_from is not None:
        load_states(run.resume_from, states, run.rows.streamed)

    guard = NonFiniteGuard(run.model, config.train, recorder)
    model.train()
    is_over = position.step == run.total_steps or judge(run, recorder).is_enough
    while not is_over:
        epoch = position.epoch
        start_at(loader, epoch, position.rows // run.global_batch)
        batches = iter(loader)
        if run.resume_from is not None and position == run.position:
            restore_random_states(
                run.resume_from, config.seed
            )  # after the iterator has started, which may draw numbers itself

        while position.epoch == epoch and not is_over:
            # The micro-batches of one step; at the end of an epoch there may be fewer.
            micro_batches = list(islice(batches, config.train.gradient_accumulation_steps))
            own_targets = sum(int((batch["shift_labels"] != IGNORE_INDEX).sum()) for batch in micro_batches)
            own = [own_targets, int(stop.signal is not None)]
            # One exchange a step, of the targets and of whether any process was asked to stop.
            targets, is_stopping = accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum")
            if config.train.compile and position == run.position:
                check_compiled(run, recorder, accelerator, model, micro_batches[0], targets)

            step_loss = torch.zeros((), device=accelerator.device)
            for number, batch in enumerate(micro_batches, start=1):
                with exchange_gradients(accelerator, model, is_last=number == len(micro_batches)):
                    # Each loss is a sum divided by all targets of the step, so that the step's loss is their mean
                    # however unequal the micro-batches are. DDP and FSDP average over processes: the factor undoes it.
                    output = model(
                        **send_to_device(batch, accelerator.device), num_items_in_batch=targets, skip_logits=True
                    )
                    loss = output.loss * accelerator.num_processes
                    accelerator.backward(loss)
                step_loss += loss.detach()

            # A limit of infinity measures the norm and leaves the gradients as they are.
            limit = config.optim.max_grad_norm or float("inf")
            grad_norm = full_tensor(accelerator.clip_grad_norm_(model.parameters(), limit))
            learning_rate = schedule.get_last_lr()[0]
            position = run.next_position(position, len(micro_batches), int(targets))
            is_finite = guard.should_step(position, grad_norm, micro_batches, targets)
            if not is_finite:
                clear_overflow(optimizer)
                optimizer.zero_grad()  # without gradients a step leaves the weights and the optimizer as they are
            optimizer.step()
            if not accelerator.optimizer_step_was_skipped:  # fp16 skips a step whose gradients overflowed
                schedule.step()
            optimizer.zero_grad()

            if is_finite and is_due(config.train.log_every, position.step, run):
                loss_value = float(accelerator.reduce(step_loss, "mean"))
                recorder.training(position.step, loss_value, float(grad_norm), float(learning_rate), position.tokens)
            evaluation, is_asked = None, bool(is_stopping)
            if is_evaluation_due(position.step, run) and not is_asked:
                evaluation = evaluate(run, recorder, position, config.train.eval_rows, stop)
                is_asked = evaluation is None
            verdict = judge(run, recorder) if evaluation else Verdict()
            is_over = position.step == run.total_steps or verdict.is_enough
            if is_asked or verdict.is_best or verdict.is_enough or is_checkpoint_due(position.step, run):
                save_checkpoint(run, recorder, position, states, evaluation["val_loss"] if evaluation else None)
            if is_asked:
                raise stopped(run, position)
    return position
