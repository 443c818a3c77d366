"""The same run through transformers' Trainer, bit for bit what loop.py does.

Trainer owns the loop: devices, accumulation, backward, clipping. What happens around a step is `TrainingControl`'s, as
in loop.py; `HFGPTTrainer` calls it in the places that Trainer has for that.
"""

from itertools import islice
from typing import Any

import torch
from accelerate.utils import patch_environment
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hfgpt.data.loaders import start_at
from hfgpt.distributed.launch import configure_engine, make_training_arguments
from hfgpt.training.control import MicroBatches, TrainingControl
from hfgpt.training.optim import make_optimizer, make_schedule
from hfgpt.training.run import Run


def run_trainer(run: Run, control: TrainingControl) -> None:
    """Train `run.model` in place, until training is over.

    Raises:
        Stopped: a stop was asked for; there is a checkpoint of the last step.
    """
    with patch_environment(ACCELERATE_MIXED_PRECISION="no"):  # the recipe's holds against a launcher's
        trainer = HFGPTTrainer(run, control, training_arguments(run))
    configure_engine(trainer.accelerator)
    trainer.remove_callback(PrinterCallback)
    if control.is_over:  # Trainer would train one step before it looks
        # The evaluation runs under the run's precision. A model that is split already must not be wrapped.
        trainer.accelerator.prepare_model(run.model, device_placement=False, evaluation_mode=True)
        return
    trainer.train(resume_from_checkpoint=None if run.resume_from is None else str(run.resume_from))


def training_arguments(run: Run) -> TrainingArguments:
    """The recipe in Trainer's words; when to log, evaluate and save is not Trainer's to decide."""
    config = run.config
    return make_training_arguments(
        config,
        output_dir=str(run.folder),
        seed=config.seed,
        max_steps=run.total_steps,
        per_device_train_batch_size=config.train.batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        max_grad_norm=config.optim.max_grad_norm,
        torch_compile=bool(run.is_compiled),
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


class ControlCallback(TrainerCallback):
    """Calls `TrainingControl` where a step ends, and sets the order of the rows where an epoch begins."""

    def __init__(self, trainer: "HFGPTTrainer") -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Trainer sets the epoch of loaders of accelerate only.
        start_at(kwargs["train_dataloader"], int(state.epoch or 0), 0)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.training_control.end_step()
        control.should_training_stop |= self.trainer.training_control.is_over


class HFGPTTrainer(Trainer):
    """transformers' Trainer on a run's rows, optimizer and schedule, under `TrainingControl`."""

    optimizer: Optimizer | None

    def __init__(self, run: Run, control: TrainingControl, arguments: TrainingArguments) -> None:
        self.run, self.training_control = run, control
        super().__init__(
            model=run.model,
            args=arguments,
            train_dataset=run.rows.train,  # only its length is read; the batches come from `get_train_dataloader`
            callbacks=[ControlCallback(self)],
        )

    def get_train_dataloader(self) -> DataLoader:
        return self.run.train_loader()

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:  # for DeepSpeed Trainer asks twice
            self.optimizer = make_optimizer(self.run.model if model is None else model, self.run.optim)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        target = self.optimizer if optimizer is None else optimizer
        assert target is not None
        self.lr_scheduler = schedule = make_schedule(target, self.run.optim, num_training_steps)
        self._created_lr_scheduler = True
        return schedule

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # it would load files of its own
        self.training_control.set_up(self.accelerator, self.model_wrapped, self.optimizer, self.lr_scheduler)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: `open_run` has loaded and verified the weights."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self.training_control.restore_random_states()

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[MicroBatches, Tensor]:
        micro_batches = list(islice(epoch_iterator, num_batches))
        self.step_loss = torch.zeros((), device=device)
        return self.training_control.begin_step(micro_batches)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs, "skip_logits": True}, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.step_loss += loss
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Measure the norm, and drop gradients that must not be used: the step that follows then changes nothing."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.training_control.should_step(norm, self.step_loss):
            model.zero_grad()
        return norm
