"""What both loops do around an optimizer step: order of the data, resuming, checks, logging, evaluating, saving.

loop.py and trainer.py call the methods of one `TrainingControl` in the same places; what lies between the calls, the
forward and backward passes and the optimizer, is theirs.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, send_to_device, set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from hfgpt.data.loaders import start_at
from hfgpt.distributed.deepspeed import clear_overflow
from hfgpt.distributed.sharding import optimizer_state
from hfgpt.loss import IGNORE_INDEX
from hfgpt.training import checkpoint
from hfgpt.training.early_stopping import EarlyStopping
from hfgpt.training.evaluate import evaluate
from hfgpt.training.nonfinite import NonFiniteGuard
from hfgpt.training.recorder import Recorder
from hfgpt.training.run import Run
from hfgpt.training.saving import save_checkpoint
from hfgpt.training.signals import Stopped, StopRequest
from hfgpt.training.startup_checks import check_compiled

MicroBatches = list[dict[str, Tensor]]


class TrainingControl:
    """Where training stands, and what happens before and after each step.

    Args:
        run: from `open_run`.
        recorder: writes and shows what happens.
        stop: whether a signal has asked to stop.
        on_step: called with the number of each step that is done and logged, before it is evaluated or saved. What it
            raises ends the run as a kill would.

    Attributes:
        state: where training stands; during a step, where it will stand after it.
        is_over: whether the last step is done, or early stopping has ended training.
    """

    def __init__(
        self, run: Run, recorder: Recorder, stop: StopRequest, on_step: Callable[[int], None] = lambda step: None
    ) -> None:
        self.run, self.recorder, self.stop, self.on_step = run, recorder, stop, on_step
        self.state = run.start
        self.early_stopping = EarlyStopping(run.config.train.patience, recorder)
        self.is_over = False

    def evaluate_start(self) -> None:
        """Evaluate where training starts or goes on, if that is missing: a kill can come between a step and that.

        Raises:
            Stopped: a stop was asked for.
        """
        run, step = self.run, self.state.step
        is_wanted = step == 0 or self.is_evaluation_due()
        is_missing = is_wanted and all(line["step"] != step for line in self.recorder.evaluations)
        if broadcast_object_list([is_missing])[0]:  # the main process alone knows the evaluations
            line = evaluate(run, self.recorder, self.state, self.stop)
            if line is None:
                raise self.stopped()
            if run.resume_from is not None and PartialState().is_main_process:
                checkpoint.record_score(run.resume_from, line["val_loss"])  # as if it had been there when written
        _, should_stop = self.early_stopping.update()
        self.is_over = step == run.total_steps or should_stop

    def set_up(self, accelerator: Accelerator, model: nn.Module, optimizer: Any, schedule: LRScheduler) -> None:
        """Take what accelerate has prepared, seed the process, and load the checkpoint's states if the run goes on.

        `model` is what accelerate has put around `run.model`, or that itself.
        """
        run = self.run
        self.accelerator, self.model, self.optimizer, self.schedule = accelerator, model, optimizer, schedule
        self.states: dict[str, Any] = {"optimizer": optimizer_state(run.model, optimizer), "schedule": schedule}
        if accelerator.scaler is not None:
            self.states["scaler"] = accelerator.scaler
        set_seed(run.config.seed + PartialState().process_index)  # each process draws dropout of its own
        if run.resume_from is not None:
            checkpoint.load_states(run.resume_from, self.states, run.rows.streamed)
        self.guard = NonFiniteGuard(run.model, run.config.train, self.recorder, bool(run.is_compiled))

    def steps(self, loader: DataLoader) -> Iterator[MicroBatches]:
        """Yield the micro-batches of each optimizer step until training is over, from the row where the run goes on.

        The last step of an epoch may have fewer micro-batches.
        """
        while not self.is_over:
            epoch = self.state.epoch
            start_at(loader, epoch, self.state.rows // self.run.global_batch)
            batches = iter(loader)
            if self.state == self.run.start:
                self.restore_random_states()  # after the iterator has started, which may draw numbers itself
            while self.state.epoch == epoch and not self.is_over:
                yield list(islice(batches, self.run.config.train.gradient_accumulation_steps))

    def restore_random_states(self) -> None:
        """Set the random number generators to those of the checkpoint, if the run goes on from one."""
        if self.run.resume_from is not None:
            checkpoint.restore_random_states(self.run.resume_from, self.run.config.seed)

    def begin_step(self, micro_batches: MicroBatches) -> tuple[MicroBatches, Tensor]:
        """Send a step's micro-batches to the device, and count their targets.

        Several processes count in one exchange, in which all learn whether to stop. A process alone counts before it
        sends, and does not wait for its GPU. The first step of a compiled run is compared with eager code here.

        Returns:
            The micro-batches and the number of targets over all processes, int64, on this process's device.
        """
        device, is_asked = self.accelerator.device, self.stop.signal is not None
        count = sum(int((batch["shift_labels"] != IGNORE_INDEX).sum()) for batch in micro_batches)
        self.targets = torch.full((), count, device=device)
        if self.accelerator.num_processes > 1:
            own = torch.tensor([count, int(is_asked)], device=device)
            self.targets, asked = self.accelerator.reduce(own, "sum")
            count, is_asked = int(self.targets), bool(asked)
        self.micro_batches = [send_to_device(batch, device, non_blocking=True) for batch in micro_batches]
        self.is_asked_to_stop = is_asked
        if self.run.is_compiled and self.state == self.run.start:
            check_compiled(self.run, self.recorder, self.accelerator, self.model, self.micro_batches[0], self.targets)
        self.state = self.run.next_state(self.state, len(micro_batches), count)
        return self.micro_batches, self.targets

    def should_step(self, grad_norm: Tensor | float, loss: Tensor) -> bool:
        """Whether the optimizer may use the gradients; if not, the loop drops them before it takes its step.

        A GPU is waited for here only, before it has the optimizer's step to do: while it does that, the next step is
        made ready.

        Args:
            grad_norm: of the step, before clipping. Under fp16 it may be infinite: the scaler then skips the step.
            loss: of the step, nats per token; this process's share, whose mean over the processes is the step's loss.

        Raises:
            FloatingPointError: training has diverged or learns nothing, see `NonFiniteGuard.should_step`.
        """
        self.grad_norm, self.learning_rate = float(grad_norm), float(self.schedule.get_last_lr()[0])
        self.is_used = self.guard.should_step(self.state, self.grad_norm, self.micro_batches, self.targets)
        if not self.is_used:
            clear_overflow(self.optimizer)
        elif self.is_due(self.run.config.train.log_every):
            self.loss = float(self.accelerator.reduce(loss, "mean"))
        return self.is_used

    def end_step(self) -> None:
        """Log the step, then evaluate, save and stop where the recipe, early stopping or a signal asks for it.

        Raises:
            Stopped: a stop was asked for; there is a checkpoint of this step.
        """
        run, state, train = self.run, self.state, self.run.config.train
        if self.is_used and self.is_due(train.log_every):
            self.recorder.log_step(state.step, self.loss, self.grad_norm, self.learning_rate, state.tokens)
        self.on_step(state.step)
        line, is_asked = None, self.is_asked_to_stop
        if self.is_evaluation_due() and not is_asked:
            line = evaluate(run, self.recorder, state, self.stop)
            is_asked = line is None
        is_best, should_stop = self.early_stopping.update() if line else (False, False)
        self.is_over = state.step == run.total_steps or should_stop
        if is_asked or is_best or should_stop or self.is_checkpoint_due():
            save_checkpoint(run, self.recorder, state, self.states, line["val_loss"] if line else None)
        if is_asked:
            raise self.stopped()

    def is_due(self, every: int | str) -> bool:
        """Whether what happens `every` so many steps, or every `epoch`, happens after this step."""
        steps = self.run.steps_per_epoch if every == "epoch" else int(every)
        return steps > 0 and self.state.step % steps == 0

    def is_evaluation_due(self) -> bool:
        """Whether training evaluates after this step.

        After the last step all rows are scored anyway. With patience the usual rows are scored as well, so that the
        last weights can be compared with the best.
        """
        if self.state.step == self.run.total_steps:
            return self.run.config.train.patience is not None
        return self.is_due(self.run.config.train.eval_every)

    def is_checkpoint_due(self) -> bool:
        """Whether this step ends with a checkpoint; the last one does, unless the recipe wants none."""
        every = self.run.config.train.save_every
        return every != 0 and (self.is_due(every) or self.state.step == self.run.total_steps)

    def save_last_step(self) -> None:
        """Write a checkpoint of the last step, where the recipe wants none; every process calls it."""
        is_there = (self.run.folder / f"checkpoint-{self.state.step}").is_dir()
        if not broadcast_object_list([is_there])[0]:  # another machine may not see the folder
            save_checkpoint(self.run, self.recorder, self.state, self.states, None)

    def stopped(self, more: str = "") -> Stopped:
        """What to raise when a run stops because it was asked to; `more` follows what is said."""
        newest = next(iter(checkpoint.checkpoints(self.run.folder)), None)
        where = "It has no checkpoint and starts again" if newest is None else f"It goes on from {newest.name}"
        step, total = self.state.step, self.run.total_steps
        return Stopped(f"stopped at step {step} of {total}, as asked. {where} with `--resume`.{more}")
