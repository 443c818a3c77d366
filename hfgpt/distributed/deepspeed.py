"""DeepSpeed's ZeRO: a recipe in its words, and what it splits over the processes put together again.

Stage 1 splits the state of the optimizer, stage 2 the gradients as well, stage 3 the weights too. A checkpoint holds
all of it whole and by the names of the parameters, as with every other engine, so that a run may go on under another
stage, another engine and another number of processes.

Source:
    Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
    https://arxiv.org/abs/1910.02054
"""

import importlib.util
import logging
import os
import warnings
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, parse_flag_from_env
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.integrations import unset_hf_deepspeed_config

from hfgpt.config.schema import RunConfig
from hfgpt.system.extras import needs

SETTINGS = {
    *("zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "fp16", "bf16", "amp", "torch_autocast", "zero_allow_untested_optimizer"),
    *("zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown"),
}
"""Sections of DeepSpeed's configuration that a launcher may have; many others would change what a run computes."""

ZERO_SETTINGS = {
    *("stage", "offload_optimizer", "offload_param", "overlap_comm", "contiguous_gradients", "reduce_scatter"),
    *("reduce_bucket_size", "allgather_bucket_size", "allgather_partitions", "round_robin_gradients", "sub_group_size"),
    *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters"),
    *("stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save"),
}
"""The same within `zero_optimization`: sizes and ways of the exchange."""

OFFLOAD_SETTINGS = {"device", "nvme_path", "pin_memory"}
"""The same within `offload_optimizer` and `offload_param`."""


def is_asked_for() -> bool:
    """Whether the launcher asks for DeepSpeed.

    Raises:
        ValueError: it does, and DeepSpeed is not installed.
    """
    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return False
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(needs("a launcher that asks for DeepSpeed", "deepspeed"))
    return True


def backend() -> str | None:
    """The backend of DeepSpeed's processes on CPUs; None elsewhere, where accelerate (1.15) knows it."""
    if not is_asked_for() or torch.cuda.is_available() or "LOCAL_RANK" not in os.environ:
        return None
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference: spare the C++ compiler
    return "gloo"


def deepspeed_plugin(config: RunConfig, accumulation_steps: int) -> DeepSpeedPlugin | None:
    """DeepSpeed's plugin, of the launcher's settings and the recipe's; None if another engine is asked for.

    Args:
        config: the recipe.
        accumulation_steps: micro-batches by which DeepSpeed is to divide a loss that it is given.

    Raises:
        ValueError: the launcher contradicts the recipe, or asks for what hfgpt does not drive.
    """
    if not is_asked_for():
        return None
    plugin = DeepSpeedPlugin(zero3_init_flag=False)  # hfgpt makes the weights whole, and DeepSpeed splits them
    settings = plugin.deepspeed_config
    check_settings(settings)
    check_combination(config, plugin.zero_stage)
    check_numbers(settings, config)
    train = config.train
    settings["train_micro_batch_size_per_gpu"] = train.batch_size
    settings["gradient_accumulation_steps"] = accumulation_steps
    settings["train_batch_size"] = "auto"  # accelerate multiplies
    settings["gradient_clipping"] = config.optim.max_grad_norm or 0.0
    settings["zero_force_ds_cpu_optimizer"] = False  # the recipe's optimizer, on the CPU too
    if train.precision == "bf16":  # autocast, as without DeepSpeed: weights, gradients and what is exchanged stay fp32
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return plugin


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse what would change a run behind its recipe.

    Raises:
        ValueError: naming the setting.
    """
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise ValueError(f"the launcher's DeepSpeed has a section `{section}`: the recipe's `optim` says that.")
    for section in ("fp16", "bf16", "amp", "torch_autocast"):
        if not isinstance(settings.get(section, {}), dict):
            raise ValueError(f"the launcher's DeepSpeed has `{section}` {settings[section]!r}, which is no section.")
        if settings.get(section, {}).get("enabled", False) not in (False, "auto"):
            raise ValueError(f"the launcher's DeepSpeed enables `{section}`: the recipe's `train.precision` says that.")
    for name in [*(settings.keys() - SETTINGS), *(settings["zero_optimization"].keys() - ZERO_SETTINGS)]:
        raise ValueError(f"the launcher's DeepSpeed has `{name}`, which hfgpt does not drive. Leave it out.")
    for part in ("offload_optimizer", "offload_param"):
        place = settings["zero_optimization"].get(part) or {}
        for name in place.keys() - OFFLOAD_SETTINGS:
            raise ValueError(f"the launcher's DeepSpeed has `{part}.{name}`, which hfgpt does not drive. Leave it out.")
        if place.get("device") == "nvme":
            raise ValueError(f"the launcher's DeepSpeed has `{part}` on nvme, which hfgpt does not drive. Use cpu.")


def check_numbers(settings: dict[str, Any], config: RunConfig) -> None:
    """Refuse numbers that contradict the recipe.

    Raises:
        ValueError: naming both.
    """
    train = config.train
    rows_per_step = train.batch_size * train.gradient_accumulation_steps * PartialState().num_processes
    for name, value, option in [
        ("train_batch_size", rows_per_step, "the recipe's rows per step"),
        ("train_micro_batch_size_per_gpu", train.batch_size, "`train.batch_size`"),
        ("gradient_accumulation_steps", train.gradient_accumulation_steps, "`train.gradient_accumulation_steps`"),
        ("gradient_clipping", config.optim.max_grad_norm or 0.0, "`optim.max_grad_norm`"),
    ]:
        asked = settings.get(name, "auto")
        is_default = (name, asked) == ("gradient_accumulation_steps", 1)  # a launcher's default
        if asked not in ("auto", value) and not is_default:
            raise ValueError(f'the launcher\'s DeepSpeed has `{name}` {asked}, {option}: {value}. Make it "auto".')


def check_combination(config: RunConfig, stage: int) -> None:
    """Refuse recipes that DeepSpeed, or this stage of it, is not driven with.

    Raises:
        ValueError: naming the option.
    """
    train = config.train
    if stage not in (1, 2, 3):
        raise ValueError(
            f"the launcher asks for DeepSpeed's stage {stage}, which splits nothing. Ask for stage 1, 2 or 3, or "
            "launch without DeepSpeed."
        )
    if stage == 3 and train.compile is True:
        raise ValueError("`train.compile` does not go with DeepSpeed's stage 3. Leave it out, or ask for stage 1 or 2.")
    if train.precision == "fp16":
        raise ValueError("`train.precision` ('fp16') does not go with DeepSpeed. Use bf16 or fp32.")
    if train.shard:
        raise ValueError("`train.shard` does not go with DeepSpeed, which splits by itself. Leave one of them out.")


def configure_deepspeed() -> None:
    """Quiet DeepSpeed, and keep transformers from splitting models that are loaded; once there is an Accelerator."""
    # DeepSpeed 0.19 calls torch 2.13 by names that are going to go.
    warnings.filterwarnings("ignore", r".torch\.distributed\..* is deprecated", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    unset_hf_deepspeed_config()


def is_running() -> bool:
    """Whether DeepSpeed is the engine of this process."""
    return PartialState().distributed_type == DistributedType.DEEPSPEED


def clear_overflow(optimizer: Any) -> None:
    """Let the schedule count a step that was left out because its gradients are not finite, as with other engines.

    Args:
        optimizer: accelerate's; nothing happens without DeepSpeed.
    """
    if is_running():
        optimizer.optimizer.overflow = False


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether each process holds a part of a weight (stage 3), by the mark that DeepSpeed itself goes by."""
    return hasattr(parameter, "ds_id")


def number_of_elements(parameter: nn.Parameter) -> int:
    """Of the whole weight, whatever of it is here."""
    return parameter.ds_numel if is_partitioned(parameter) else parameter.numel()  # type: ignore[attr-defined]


def whole_parameter(parameter: nn.Parameter) -> Tensor:
    """A copy of a weight that is split, put together; all processes call it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def load_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a weight that is split a value that every process has whole; all processes call it."""
    import deepspeed

    with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)


def load_groups(optimizer: Any, saved: list[dict[str, Any]]) -> None:
    """Give the groups of an optimizer their learning rates and the like back."""
    for group, there in zip(optimizer.param_groups, saved, strict=True):
        group.update({name: value for name, value in there.items() if name != "params"})


class ZeroOptimizerState:
    """The state of an optimizer that ZeRO has split, whole and by the names of the parameters; see `OptimizerState`.

    Args:
        model: whose parameters it optimizes, not wrapped.
        optimizer: DeepSpeed's, of stage 1, 2 or 3, around torch's.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.inner: Optimizer = optimizer.optimizer
        self.parameters = dict(model.named_parameters())
        self.is_stage_3 = is_partitioned(next(model.parameters()))
        # What torch's optimizer sees are flat tensors, each this process's part of many parameters.
        self.flat: list[Tensor] = (
            optimizer.fp32_partitioned_groups_flat if self.is_stage_3 else optimizer.single_partition_of_fp32_groups
        )

    def state_dict(self) -> dict[str, Any]:
        """All of it, on the CPU; all processes call this, and the first one gets it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self.link()
        is_main = PartialState().is_main_process
        groups = self.names_of_groups()
        state: dict[str, Any] = {}
        kept = self.inner.state.get(self.flat[0], {})  # empty until a step was done
        for name in (name for names in groups for name in names if kept):
            state[name] = {}
            for key, value in kept.items():
                whole = safe_get_full_optimizer_state(self.parameters[name], key) if value.ndim else value.clone()
                state[name][key] = whole.cpu().clone() if is_main else None  # a view would be saved with its filling
        named = zip(self.optimizer.param_groups, groups, strict=True)
        return {"state": state, "param_groups": [{**group, "params": names} for group, names in named]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave, of this engine or another, each process its part."""
        load_groups(self.optimizer, state["param_groups"])
        if not state["state"]:  # no step was done yet
            return
        first = next(iter(state["state"].values()))
        for flat in self.flat:
            self.inner.state[flat] = {
                key: torch.zeros_like(flat) if value.ndim else value.to(flat.device, copy=True)
                for key, value in first.items()
            }
        self.link()
        for name, kept in state["state"].items():
            for key, value in kept.items():
                if value.ndim:
                    self.set_part(self.parameters[name], key, value)

    def set_part(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Give this process its part of what is kept for a parameter, from the whole."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        value = value.to(parameter.device)
        if not is_partitioned(parameter):
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # Parts are equally long, the last ones filled up; DeepSpeed (0.19) would look for the filling in the whole.
        length = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        process = PartialState()
        filling = length * process.num_processes - value.numel()
        padded = nn.functional.pad(value.flatten(), (0, filling))
        safe_set_local_optimizer_state(parameter, padded.narrow(0, length * process.process_index, length), key)

    def link(self) -> None:
        """Tell each parameter where its part of the state lies.

        DeepSpeed (0.19) does so after the step of the first group, when the second one has no state yet.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if not self.is_stage_3:
            for group, flat in zip(self.optimizer.bit16_groups, self.flat, strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, self.inner.state)

    def names_of_groups(self) -> list[list[str]]:
        """The parameters that decay, and those that do not, by name."""
        groups = (
            [group["params"] for group in self.optimizer.trainable_param_groups]
            if self.is_stage_3
            else self.optimizer.bit16_groups
        )
        names = {parameter: name for name, parameter in self.parameters.items()}
        return [[names[parameter] for parameter in group] for group in groups]
