"""The same run through transformers' Trainer, step for step what hfgpt/training/loop.py does.

Trainer owns the loop: devices, accumulation, backward, clipping. Rows, optimizer, schedule, evaluation, lines and
checkpoints are the run's own. `HFGPTTrainer` only puts them where Trainer asks for such things.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import patch_environment
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hfgpt.data.loaders import start_at
from hfgpt.distributed import deepspeed
from hfgpt.distributed.launch import PRECISIONS, configure_engine
from hfgpt.distributed.sharding import optimizer_state
from hfgpt.hub.trainer_mixin import PushByList
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


def run_trainer(run: Run, recorder: Recorder, stop: StopRequest) -> TrainState:
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
    # Trainer would take it from a launcher, and DeepSpeed has it in its plugin.
    precision = "no" if deepspeed.is_asked_for() else PRECISIONS[run.config.train.precision]
    with patch_environment(ACCELERATE_MIXED_PRECISION=precision):
        trainer = HFGPTTrainer(run, recorder, stop)
    configure_engine(trainer.accelerator)
    trainer.remove_callback(PrinterCallback)
    seed_training(run.config)
    is_over = run.position.step == run.total_steps or judge(run, recorder).is_enough
    if is_over:  # Trainer would train one step before it looks
        # The evaluation runs under the run's precision. A model that is split already must not be wrapped.
        trainer.accelerator.prepare_model(run.model, device_placement=False, evaluation_mode=True)
        return run.position
    trainer.train(resume_from_checkpoint=None if run.resume_from is None else str(run.resume_from))
    is_enough = trainer.position.step == run.total_steps or trainer.is_enough
    if trainer.control.should_training_stop and not is_enough:
        raise stopped(run, trainer.position)
    return trainer.position


def training_arguments(run: Run) -> TrainingArguments:
    """The recipe in Trainer's words; what it evaluates, logs and saves is decided by `RunSchedule`."""
    config = run.config
    plugin = deepspeed.deepspeed_plugin(config, config.train.gradient_accumulation_steps)
    arguments = TrainingArguments(
        output_dir=str(run.folder),
        # Trainer asks to be told before it takes bf16 on a CPU; being told turns DeepSpeed off.
        use_cpu=PartialState().device.type == "cpu" and plugin is None,
        ddp_backend=deepspeed.backend(),
        seed=config.seed,
        max_steps=run.total_steps,
        per_device_train_batch_size=config.train.batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        max_grad_norm=config.optim.max_grad_norm,
        bf16=config.train.precision == "bf16" and plugin is None,
        fp16=config.train.precision == "fp16",
        torch_compile=config.train.compile,
        use_cache=run.model.config.use_cache,  # Trainer writes its own value into the model's config
        remove_unused_columns=False,  # or Trainer drops shift_labels
        ignore_data_skip=run.rows.streamed is not None,  # a stream goes on by itself where it stopped
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
    )
    if plugin is not None:  # Trainer's own, made of the launcher's words alone
        arguments.deepspeed_plugin = plugin
    return arguments


class RunSchedule(TrainerCallback):
    """Tells Trainer after which steps to log, evaluate and save: those of the recipe."""

    def __init__(self, run: Run, stop: StopRequest) -> None:
        self.run, self.stop = run, stop

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Trainer tells the epoch to the loaders of accelerate only.
        start_at(kwargs["train_dataloader"], int(state.epoch or 0), 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        step, train = state.global_step, self.run.config.train
        control.should_log = is_due(train.log_every, step, self.run)
        is_asked = self.stop.is_made()
        control.should_evaluate = is_evaluation_due(step, self.run) and not is_asked
        control.should_save = is_asked or is_checkpoint_due(step, self.run)
        control.should_training_stop = is_asked or control.should_training_stop
        return control


class HFGPTTrainer(PushByList, Trainer):
    """transformers' Trainer on a run's rows, optimizer, schedule, evaluation and checkpoints."""

    optimizer: Optimizer | None

    def __init__(self, run: Run, recorder: Recorder, stop: StopRequest) -> None:
        self.run, self.recorder, self.stop, self.position = run, recorder, stop, run.position
        self.evaluation: dict[str, Any] | None = None
        self.is_finite, self.is_enough = True, False
        self.guard = NonFiniteGuard(run.model, run.config.train, recorder)
        super().__init__(
            model=run.model,
            args=training_arguments(run),
            train_dataset=run.rows.train,  # only its length is read; the batches come from `get_train_dataloader`
            callbacks=[RunSchedule(run, stop)],
        )

    def get_train_dataloader(self) -> DataLoader:
        return self.run.train_loader()

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:  # for DeepSpeed Trainer asks twice
            self.optimizer = make_optimizer(self.run.model if model is None else model, self.run.config.optim)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        target = self.optimizer if optimizer is None else optimizer
        assert target is not None
        self.lr_scheduler = schedule = make_schedule(target, self.run.config.optim, num_training_steps)
        self._created_lr_scheduler = True
        return schedule

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        assert targets is not None
        if self.run.config.train.compile and self.position == self.run.position:
            check_compiled(self.run, self.recorder, self.accelerator, self.model_wrapped, batches[0], targets)
        # The position after the step that these batches make; it is read once the step is done.
        self.position = self.run.next_position(self.position, len(batches), int(targets))
        self.step_loss = torch.zeros((), device=device)
        self.batches, self.targets = batches, targets
        return batches, targets

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Measure the norm, and drop gradients that must not be used: the step that follows then changes nothing."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.is_finite = self.guard.should_step(self.position, norm, self.batches, self.targets)
        if not self.is_finite:
            model.zero_grad()
            deepspeed.clear_overflow(self.optimizer)
        return norm

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.step_loss += loss
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs, "skip_logits": True}, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "loss" in logs and self.is_finite:
            # Trainer's own "loss" is a mean since the last line, which a resumed run cannot know.
            loss = float(self.accelerator.reduce(self.step_loss, "mean"))
            self.recorder.training(
                self.position.step, loss, logs["grad_norm"], logs["learning_rate"], self.position.tokens
            )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.control.should_evaluate = False  # or Trainer evaluates once more at the end of the epoch
        limit = self.run.config.train.eval_rows
        self.evaluation = evaluate(self.run, self.recorder, self.position, limit, self.stop)
        verdict = judge(self.run, self.recorder) if self.evaluation else Verdict()
        self.is_enough = verdict.is_enough
        if self.evaluation is None or verdict.is_enough:
            self.control.should_save = self.control.should_training_stop = True
        self.control.should_save |= verdict.is_best
        return self.evaluation or {}

    def states(self) -> dict[str, Any]:
        """What a checkpoint keeps besides weights and random numbers."""
        optimizer = optimizer_state(self.run.model, self.optimizer)
        states: dict[str, Any] = {"optimizer": optimizer, "schedule": self.lr_scheduler}
        if self.accelerator.scaler is not None:
            states["scaler"] = self.accelerator.scaler
        return states

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        line = self.evaluation if self.evaluation and self.evaluation["step"] == self.position.step else None
        save_checkpoint(self.run, self.recorder, self.position, self.states(), line["val_loss"] if line else None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: `open_run` has loaded and verified the weights."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # it would load files of its own
        if resume_from_checkpoint is not None:
            load_states(Path(resume_from_checkpoint), self.states(), self.run.rows.streamed)
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random_states(Path(checkpoint), self.run.config.seed)
