"""Several processes: how they find one another, which engine runs them, and a model that is split over them.

DDP and FSDP2 are accelerate's, or, with `train.shard`, transformers' own FSDP2, which runs on CPUs as well.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
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
from transformers.distributed.configuration_utils import DistributedConfig

from hfgpt.modeling_hfgpt import HFGPTForCausalLM

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""Our names and accelerate's."""

FOREIGN_ENGINES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
"""What `accelerate launch` sets, and the engine that it asks for, which steps by rules of its own."""


def join_processes() -> None:
    """Let the processes of a launch find one another, before anything asks how many there are.

    Raises:
        ValueError: this is one of several processes, but they do not come together; or fewer were started than asked
            for; or they are to be run by an engine that hfgpt does not drive.
    """
    for variable, engine in FOREIGN_ENGINES.items():
        if parse_flag_from_env(variable):
            raise ValueError(
                f"the launcher asks for {engine}, which hfgpt does not drive. `train.shard=true` splits weights, "
                "gradients and optimizer state over the processes of a plain launch."
            )
    process = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    started = int(os.environ.get("WORLD_SIZE", 1))
    if process.num_processes != started:
        raise ValueError(
            f"{started} processes were started, but each is alone ({process.num_processes} in its group). "
            "Without GPUs, set ACCELERATE_USE_CPU=true."
        )
    # accelerate (1.15) names the meeting place of several processes and then starts one, with `--cpu` or MULTI_CPU.
    if started == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ:
        if "MASTER_PORT" in os.environ:
            raise ValueError(
                "`accelerate launch` was asked for several processes and started one. On CPUs several processes want "
                "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N`."
            )


def check_engine(accelerator: Accelerator) -> None:
    """Refuse to train with another engine than the launcher was asked for.

    Raises:
        ValueError: naming both.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    if accelerator.distributed_type != DistributedType.FSDP:
        came = accelerator.distributed_type.value
        raise ValueError(
            f"the launcher asks for FSDP, and accelerate gives {came}: it splits models on GPUs only. "
            "`train.shard=true` does so on CPUs too, with a plain launch."
        )
    if not accelerator.is_fsdp2:
        raise ValueError("the launcher asks for FSDP1. Set `fsdp_version: 2` in the configuration of accelerate.")


def hint_to_scale_out() -> str | None:
    """What to type to use all GPUs of this machine, if only one of several is used."""
    devices = torch.cuda.device_count()
    if devices < 2 or PartialState().num_processes > 1:
        return None
    return f"one of {devices} GPUs is used; for all: `accelerate launch --num_processes {devices} -m hfgpt train ...`"


def split_over_processes(model: HFGPTForCausalLM) -> HFGPTForCausalLM:
    """The same model, each process holding a part of every weight (FSDP2).

    Every process holds the whole once, while it is split.
    """
    parts = DistributedConfig(fsdp_size=PartialState().num_processes)
    split = HFGPTForCausalLM.from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), distributed_config=parts
    )
    return split.train(model.training)


def is_split(model: nn.Module) -> bool:
    """Whether processes hold parts of the weights, so that all of them must run each forward pass together."""
    return isinstance(model, FSDPModule)


def split_again(model: nn.Module) -> None:
    """Put weights back into parts that a forward pass without a backward has left whole.

    Until then `model.parameters()` gives whole copies, which no optimizer shall see.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def load_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Give a model all its weights, which every process has whole; where it is split, each takes its part."""
    if is_split(model):
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(weights)


def whole(tensor: Tensor) -> Tensor:
    """A tensor whose parts lie on several processes, put together; all of them call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Accelerate's `prepare`, for a model that may be split already."""
    if is_split(model):  # the model exchanges gradients by itself: only autocast is wanted
        model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return model, accelerator.prepare(optimizer)
    return accelerator.prepare(model, optimizer)


def exchange_gradients(accelerator: Accelerator, model: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Let processes exchange gradients once a step, with its last micro-batch."""
    if is_last:
        return nullcontext()
    return without_exchange(model) if isinstance(model, FSDPModule) else accelerator.no_sync(model)


@contextmanager
def without_exchange(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


class OptimizerState:
    """The state of an optimizer by the names of the parameters, whole, so that any number of processes can take it.

    Args:
        model: whose parameters it optimizes, not wrapped.
        optimizer: torch's, or accelerate's around it.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self.optimizer = model, getattr(optimizer, "optimizer", optimizer)

    def state_dict(self) -> dict[str, Any]:
        """All of it, on the CPU; where the model is split all processes call this, and the first one gets it."""
        options = StateDictOptions(full_state_dict=is_split(self.model), cpu_offload=is_split(self.model))
        return get_optimizer_state_dict(self.model, self.optimizer, options=options)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave, each process its part."""
        options = StateDictOptions(full_state_dict=is_split(self.model))
        set_optimizer_state_dict(self.model, self.optimizer, state, options=options)
