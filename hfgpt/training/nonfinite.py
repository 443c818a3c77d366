"""NaN and infinity in training: the run stops or skips the step, and names where they first came from.

Gradients of exactly 0 stop it too: nothing is learnt.
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfgpt.config.schema import TrainConfig
from hfgpt.distributed.sharding import is_finite, is_sharded
from hfgpt.training.checkpoint import TrainState
from hfgpt.training.recorder import DIVERGED, Recorder

MOST_SKIPPED_IN_A_ROW = 10
"""Steps that `on_nonfinite: skip` leaves out one after the other before the run stops: they are no accident then."""

MOST_ZEROS_IN_A_ROW = 3
"""Steps whose gradient norm is exactly 0, one after the other: the last of them stops the run."""


class NonFiniteGuard:
    """Looks at the gradient norm of every step before the optimizer does.

    A loss that is not finite makes the norm so too, and on several processes all see the same norm, so all decide
    the same. Under fp16 a norm that overflows is nothing unusual, and the scaler's to deal with.

    Args:
        model: whose steps they are.
        train: the policy and the precision.
        recorder: logs steps that were left out; it knows those before the run went on.
        is_compiled: whether the model is, which may be why nothing is learnt.
    """

    def __init__(
        self, model: PreTrainedModel, train: TrainConfig, recorder: Recorder, is_compiled: bool = False
    ) -> None:
        self.model, self.recorder = model, recorder
        self.skips, self.is_compiled = train.on_nonfinite == "skip", is_compiled
        self.is_scaled = train.precision == "fp16"
        skipped = recorder.count_in_a_row(lambda line: "skipped" in line)
        zeros = recorder.count_in_a_row(lambda line: line.get("grad_norm") == 0)
        self.skipped_in_a_row, self.zeros_in_a_row = broadcast_object_list([skipped, zeros])

    def should_step(
        self, state: TrainState, grad_norm: Tensor | float, batches: list[dict[str, Tensor]], targets: Any
    ) -> bool:
        """Whether the optimizer may take a step; if not, its gradients must be dropped.

        Args:
            state: after the step.
            grad_norm: of the step, before clipping.
            batches: micro-batches of the step; they are only run again if the norm is not finite.
            targets: in the whole step, over all processes.

        Raises:
            FloatingPointError: the norm is not finite, and the policy is to stop, or skipping does not help; or it is
                exactly 0 for the third time in a row.
        """
        norm = float(grad_norm)
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            self.check_zero_gradients(state, norm, targets)
            return True
        if self.is_scaled:  # the scaler leaves the step out
            return True
        spoilt = first_nonfinite_weight(self.model)
        found = gather_object([spoilt or repeat_step(self.model, batches, targets)])
        unknown = "a split model is not searched" if is_sharded(self.model) else "the same step done again is finite"
        origin = next((each for each in found if each), unknown)
        self.skipped_in_a_row += 1
        where = f"the gradient norm is {norm} at step {state.step} ({origin})"
        if not self.skips or spoilt:
            raise FloatingPointError(f"{where}: {DIVERGED}")
        if self.skipped_in_a_row > MOST_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"{where}, as in {MOST_SKIPPED_IN_A_ROW} steps before it, which were left out: {DIVERGED}"
            )
        self.recorder.log_skipped_step(state.step, state.tokens, norm, origin)
        return False

    def check_zero_gradients(self, state: TrainState, norm: float, targets: Any) -> None:
        """Stop a run that learns nothing. A step without targets does not count.

        Raises:
            FloatingPointError: saying what it usually means.
        """
        if norm:
            self.zeros_in_a_row = 0
        elif int(targets):
            self.zeros_in_a_row += 1
        if self.zeros_in_a_row < MOST_ZEROS_IN_A_ROW:
            return
        meaning = "a loss that does not reach the weights, or a text learnt to a loss of exactly 0"
        if self.is_scaled:
            meaning = f"gradients too small for fp16 (use bf16), {meaning}"
        if self.is_compiled:
            meaning = f"code that torch {torch.__version__} compiles without gradients (try `train.compile=false`)"
        raise FloatingPointError(
            f"the gradient norm is exactly 0 at step {state.step}, as in the steps before it: nothing is learnt. "
            f"That is usually {meaning}."
        )


def first_nonfinite_weight(model: nn.Module) -> str | None:
    """The first parameter, from the embedding to the head, that holds NaN or infinity, in words; None if none does."""
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            return f"the weights `{name}` are not finite"
    return None


def repeat_step(model: PreTrainedModel, batches: list[dict[str, Tensor]], targets: Any) -> str | None:
    """Repeat a step's forward and backward passes and name where NaN or infinity comes up first; None if nowhere.

    Nothing that training uses is changed: gradients are made apart, random numbers are put back. Where the
    model is split over processes only its weights are looked at, not this.
    """
    if is_sharded(model) or AcceleratorState().distributed_type == DistributedType.FSDP:
        return None
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices, device_type=model.device.type if devices else "cuda"):
        for batch in batches:
            origin = trace(model, send_to_device(batch, model.device), targets)
            if origin is not None:
                return origin
    return None


def trace(model: PreTrainedModel, batch: Mapping[str, Any], targets: Any) -> str | None:
    """Where in one forward and backward pass NaN or infinity comes up first, in words."""
    layers: list[str] = []
    with ExitStack() as hooks:
        for name, module in model.named_modules():

            def look(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                if not layers and any(not tensor.isfinite().all() for tensor in tensors_in(output)):
                    layers.append(name)

            hooks.callback(module.register_forward_hook(look).remove)
        loss = model(**batch, num_items_in_batch=targets, skip_logits=True).loss
    if layers and layers[0]:  # the whole model, whose name is empty, is not where it comes from
        return f"the output of `{layers[0]}` is the first that is not finite"
    if not loss.isfinite():
        return "the loss is the first that is not finite"
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in parameters], allow_unused=True)
    # Backward goes from the head to the embedding.
    for (name, _), gradient in reversed(list(zip(parameters, gradients, strict=True))):
        if gradient is not None and not gradient.isfinite().all():
            return f"the gradient of `{name}` is the first that is not finite"
    return None


def tensors_in(output: Any) -> Iterable[Tensor]:
    """Floating-point tensors of a module's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in tensors_in(value)]
    if isinstance(output, tuple | list):
        return [tensor for value in output for tensor in tensors_in(value)]
    return []


def check_finite_weights(model: nn.Module, step: int) -> None:
    """Keep weights that are no numbers from being saved.

    Raises:
        FloatingPointError: naming the first of them.
    """
    spoilt = first_nonfinite_weight(model)
    if spoilt is not None:
        raise FloatingPointError(f"{spoilt} at step {step}: {DIVERGED}")
