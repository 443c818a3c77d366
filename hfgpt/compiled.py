"""Is a compiled step the step that was written? Its first micro-batch tells, before anything is trained.

torch.compile has been wrong without a word: a finite loss, and gradients of exactly 0.
"""

import math
import time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn

from hfgpt.config.schema import DROPOUT_FIELDS
from hfgpt.distributed import deepspeed
from hfgpt.recorder import Recorder
from hfgpt.run import Run

TOLERANCES = {"fp32": 20 * 2**-11, "fp16": 20 * 2**-11, "bf16": 20 * 2**-8}
"""How far apart two right steps may be, relative: some twenty roundings in a row, each half a unit in the last place of
what is multiplied (on a GPU accelerate multiplies in TF32 where a compiled run is fp32). What is wrong is off by 1."""


def check_compiled(
    run: Run, recorder: Recorder, accelerator: Accelerator, model: nn.Module, batch: dict[str, Tensor], targets: Any
) -> None:
    """Compare loss and gradients of the prepared model, compiled, with those of the very same one run eagerly.

    Dropout is off, since compiled code draws other masks; a model that has any is therefore compiled once more when
    training begins. Random numbers, gradients and weights are left as they are. Every process calls this.

    Args:
        run: whose step it is.
        recorder: hears how far apart they are, and how long that took.
        accelerator: has prepared `model`.
        model: what is trained, around `run.model`.
        batch: the first micro-batch of this process.
        targets: in the whole step, over all processes.

    Raises:
        ValueError: they are not the same; naming both norms and what to do.
    """
    recorder.pause()
    started_at = time.perf_counter()
    device = accelerator.device
    batch = send_to_device(batch, device)
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    dropouts = {name: getattr(run.model.config, name) for name in DROPOUT_FIELDS}
    set_all(run.model.config, dict.fromkeys(DROPOUT_FIELDS, 0.0))
    model.train()
    devices = [] if device.type == "cpu" else [device]
    context = accelerator.no_sync(model)
    if (
        deepspeed.is_running()
    ):  # its engine, which casts, would take a backward pass from its output for one of training
        model, is_half = run.model, run.config.train.precision == "bf16"
        context = torch.autocast(device.type, torch.bfloat16, enabled=is_half)
    try:
        with context, torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            loss, gradients = differentiate(model, parameters, batch, targets)
            # Row by row, since eager code may need memory that compiled code does not.
            rows = [{name: each[row : row + 1] for name, each in batch.items()} for row in range(len(batch["labels"]))]
            with torch.compiler.set_stance("force_eager"):
                eager_loss, eager_gradients = differentiate(model, parameters, rows[0], targets)
                for row in rows[1:]:
                    row_loss, row_gradients = differentiate(model, parameters, row, targets)
                    eager_loss += row_loss
                    torch._foreach_add_(eager_gradients, row_gradients)
    finally:
        set_all(run.model.config, dropouts)
    if any(dropouts.values()):
        torch.compiler.reset()  # or the changed numbers would be compiled as if they were to change again and again
    scale = 1 / max(1, int(targets))  # of the mean, as in the lines of training
    norm, eager_norm = length(gradients) * scale, length(eager_gradients) * scale
    torch._foreach_sub_(gradients, eager_gradients)
    apart = length(gradients) * scale
    seconds = time.perf_counter() - started_at
    tolerance = TOLERANCES[run.config.train.precision]
    is_same = apart <= tolerance * eager_norm and abs(loss - eager_loss) <= tolerance * max(1.0, eager_loss)
    # Where eager code itself is not finite there is nothing to compare with, and the first step will tell.
    problem = None
    if math.isfinite(eager_norm) and not is_same:
        problem = (
            f"`train.compile` computes another step than eager code (torch {torch.__version__}, "
            f"{run.config.train.precision}, {device.type}): gradient norm {norm:.4g}, eager {eager_norm:.4g}, "
            f"{apart:.4g} apart; loss {loss:.6g}, eager {eager_loss:.6g}. Nothing was trained. Set "
            "`train.compile=false` in another `output_dir`, or take another torch."
        )
    first = next((each for each in gather_object([problem]) if each), None)
    if first is not None:
        raise ValueError(first)
    recorder.say(
        f"the compiled step is the eager one: gradient norm {norm:.4g} and {eager_norm:.4g}, {apart:.1e} apart "
        f"({seconds:.0f} s)"
    )
    recorder.resume()


def differentiate(
    model: nn.Module, parameters: list[nn.Parameter], batch: dict[str, Tensor], targets: Any
) -> tuple[float, list[Tensor]]:
    """The loss of a micro-batch, divided by the targets of its step, and the gradients of its sum, made apart.

    Of the sum, because without the scaler of training gradients of the mean would vanish in fp16.
    """
    loss = model(**batch, num_items_in_batch=targets, skip_logits=True).loss
    gradients = torch.autograd.grad(loss * targets, parameters, allow_unused=True, materialize_grads=True)
    return float(loss.detach()), list(gradients)


def length(gradients: list[Tensor]) -> float:
    """The norm of all gradients together."""
    return float(torch.stack([gradient.float().norm() for gradient in gradients]).norm())


def set_all(config: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)
