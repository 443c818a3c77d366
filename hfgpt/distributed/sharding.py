"""A model that is split over processes: its weights and the state of its optimizer, whole and in parts.

DDP, FSDP2 and DeepSpeed (deepspeed.py) are accelerate's, or, with `train.shard`, transformers' own FSDP2, which runs on
CPUs as well.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from hfgpt.distributed import deepspeed


def engine(model: nn.Module) -> str | None:
    """Which engine runs a model on several processes; None on one."""
    if deepspeed.is_running():
        return "DeepSpeed"
    # A run that only scores what it has trained is not split any more under Trainer, but was.
    if is_sharded(model) or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "FSDP2"
    return "DDP" if PartialState().num_processes > 1 else None


def shard_model(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, each process holding a part of every weight (FSDP2).

    Every process holds the whole once, while it is split.
    """
    parts = DistributedConfig(fsdp_size=PartialState().num_processes)
    split = type(model).from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), distributed_config=parts
    )
    return split.train(model.training)


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of the weights, so that all of them must run each forward pass together."""
    return isinstance(model, FSDPModule) or deepspeed.is_partitioned(next(model.parameters()))


def reshard(model: nn.Module) -> None:
    """Put weights back into parts that a forward pass without a backward has left whole.

    Until then `model.parameters()` gives whole copies, which no optimizer shall see.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def load_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Give a model all its weights, which every process has whole; where it is split, each takes its part."""
    if deepspeed.is_partitioned(next(model.parameters())):
        for name, parameter in model.named_parameters():
            deepspeed.load_parameter(parameter, weights[name])
    elif is_sharded(model):
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(weights)


def gather_full_state_dict(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The weights of a model that accelerate has split, put together on the CPU of the first process; all call it.

    None where it is whole, or transformers has split it, which puts it together by itself when it saves.
    """
    if not is_sharded(model) or model.is_distributed_loading_by_transformers:
        return None
    weights = {}
    for name, parameter in model.named_parameters():
        split = deepspeed.is_partitioned(parameter)
        weight = deepspeed.whole_parameter(parameter) if split else full_tensor(parameter.detach())
        if PartialState().is_main_process:
            weights[name] = weight.cpu()
    return weights


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, whole, and tied ones once."""
    return sum(deepspeed.number_of_elements(parameter) for parameter in model.parameters())


def is_finite(parameter: nn.Parameter) -> bool:
    """Whether a weight holds numbers only; where it is split all processes call this."""
    if deepspeed.is_partitioned(parameter):
        return bool(deepspeed.whole_parameter(parameter).isfinite().all())
    return bool(full_tensor(parameter.isfinite().all()))


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor whose parts lie on several processes, put together; all of them call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Accelerate's `prepare`, for a model that may be split already."""
    if is_sharded(model):  # the model exchanges gradients by itself: only autocast is wanted
        model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return model, accelerator.prepare(optimizer)
    return accelerator.prepare(model, optimizer)


def exchange_gradients(accelerator: Accelerator, model: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Let processes exchange gradients once a step, with its last micro-batch."""
    if deepspeed.is_running():
        accelerator.sync_gradients = is_last  # and with the exchange comes the step of the optimizer
        return nullcontext()
    if is_last:
        return nullcontext()
    return without_exchange(model) if isinstance(model, FSDPModule) else accelerator.no_sync(model)


def for_own_gradients(
    accelerator: Accelerator, model: nn.Module, inner: nn.Module, precision: str
) -> tuple[nn.Module, AbstractContextManager[Any]]:
    """What to run, and under which context, for gradients that are no step's: processes exchange nothing.

    `model` is what `accelerator` has prepared, `inner` the same without its wrapping.
    """
    if deepspeed.is_running():  # its engine, which casts, would take any backward pass for one of training
        return inner, torch.autocast(accelerator.device.type, torch.bfloat16, enabled=precision == "bf16")
    return model, accelerator.no_sync(model)


@contextmanager
def without_exchange(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def optimizer_state(model: nn.Module, optimizer: Any) -> "OptimizerState | deepspeed.ZeroOptimizerState":
    """What a checkpoint keeps of an optimizer, torch's or accelerate's around it, of a model that is not wrapped."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return deepspeed.ZeroOptimizerState(model, inner) if deepspeed.is_running() else OptimizerState(model, inner)


class OptimizerState:
    """The state of an optimizer by the names of the parameters, whole, so that any number of processes can take it.

    Args:
        model: whose parameters it optimizes, not wrapped.
        optimizer: torch's.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """All of it, on the CPU; where the model is split all processes call this, and the first one gets it."""
        if not self.optimizer.state:  # no step was done yet; torch would do one, and count it
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            groups = self.optimizer.param_groups
            return {
                "state": {},
                "param_groups": [{**group, "params": [names[each] for each in group["params"]]} for group in groups],
            }
        options = StateDictOptions(full_state_dict=is_sharded(self.model), cpu_offload=is_sharded(self.model))
        saved: dict[str, Any] = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        if saved:  # the first process's
            # In the groups' order, in which torch loads it: an optimizer has its own, that in which it met gradients.
            ordered = [name for group in saved["param_groups"] for name in group["params"]]
            saved["state"] = {name: saved["state"][name] for name in ordered if name in saved["state"]}
        return saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave, each process its part."""
        if state["state"]:  # else no step was done yet
            options = StateDictOptions(full_state_dict=is_sharded(self.model))
            set_optimizer_state_dict(self.model, self.optimizer, dict(state), options=options)
        deepspeed.load_groups(self.optimizer, state["param_groups"])  # torch makes lists of the tuples in them
