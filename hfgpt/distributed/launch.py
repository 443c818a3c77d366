"""A launch of several processes: how they find one another, and which options of the launcher a recipe allows."""

import os
from pathlib import PurePath
from typing import Any

import psutil
import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments

from hfgpt.config.schema import RunConfig
from hfgpt.distributed import deepspeed

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""Our names and accelerate's."""


def join_processes() -> None:
    """Let the processes of a launch find one another, before anything asks how many there are.

    Raises:
        ValueError: this is one of several processes, but they do not come together; or fewer were started than asked
            for; or they are to be run by an engine that hfgpt does not drive.
    """
    if parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError(
            "the launcher asks for Megatron-LM, which hfgpt does not drive. `train.shard=true` splits weights, "
            "gradients and optimizer state over the processes of a plain launch."
        )
    process = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), backend=deepspeed.backend())
    if deepspeed.is_asked_for() and not deepspeed.is_running():
        raise ValueError(
            f"the launcher asks for DeepSpeed, and accelerate gives {process.distributed_type.value}: "
            "ACCELERATE_USE_CPU (`use_cpu`, `--cpu`) turns it off. DeepSpeed finds CPUs by itself: leave that out."
        )
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


def leave_processes() -> None:
    """Destroy the process group at the end of a command; all processes call it.

    Left to the end of the interpreter, gloo may abort a process that has done its work (pytorch issue 190489).
    """
    if torch.distributed.is_initialized():
        PartialState().wait_for_everyone()
        torch.distributed.destroy_process_group()


def join_launch(config: RunConfig) -> None:
    """`join_processes` for a run: refuse what the launcher asks and the recipe, or the engine, denies.

    Raises:
        ValueError: see `check_launcher`, `join_processes` and `hfgpt.distributed.deepspeed.deepspeed_plugin`.
    """
    check_launcher(config)
    join_processes()
    deepspeed.deepspeed_plugin(config, accumulation_steps=1)  # refuses by itself, before anything is written


def make_accelerator(config: RunConfig, is_compiled: bool | None) -> Accelerator:
    """An Accelerator with the precision of the recipe and the engine of the launcher, which may compile what it gets.

    Raises:
        ValueError: see `configure_engine`.
    """
    plugin = deepspeed.deepspeed_plugin(config, accumulation_steps=1)
    accelerator = Accelerator(
        mixed_precision=PRECISIONS[config.train.precision] if plugin is None else "no",
        deepspeed_plugin=plugin,
        dynamo_backend="inductor" if is_compiled else "no",
        # Accumulation is the loop's; a launcher's variable must not divide the loss once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    configure_engine(accelerator)
    return accelerator


def make_training_arguments(config: RunConfig, **options: Any) -> TrainingArguments:
    """The same for transformers' Trainer, which makes an Accelerator of its own: `options`, and device and engine."""
    plugin = deepspeed.deepspeed_plugin(config, config.train.gradient_accumulation_steps)
    arguments = TrainingArguments(
        # Trainer wants `use_cpu` before it takes bf16 on a CPU; that turns DeepSpeed off.
        use_cpu=PartialState().device.type == "cpu" and plugin is None,
        ddp_backend=deepspeed.backend(),
        bf16=config.train.precision == "bf16" and plugin is None,  # DeepSpeed has the precision in its plugin
        fp16=config.train.precision == "fp16",
        **options,
    )
    if plugin is not None:  # Trainer's own is made of the launcher's words alone
        arguments.deepspeed_plugin = plugin
    return arguments


def configure_engine(accelerator: Accelerator) -> None:
    """Check that the engine is the one asked for, and set its precision by the recipe; call it before `prepare`.

    Raises:
        ValueError: the launcher was asked for another engine.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if accelerator.distributed_type != DistributedType.FSDP:
            raise ValueError(
                f"the launcher asks for FSDP, and accelerate gives {accelerator.distributed_type.value}: it splits "
                "models on GPUs only. `train.shard=true` does so on CPUs too, with a plain launch."
            )
        if not accelerator.is_fsdp2:
            raise ValueError("the launcher asks for FSDP1. Set `fsdp_version: 2` in the configuration of accelerate.")
    deepspeed.configure_deepspeed()
    if accelerator.is_fsdp2:
        # Autocast alone, as with every engine. accelerate (1.15) would round weights, gradients and even losses too.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()


def hint_to_scale_out() -> str | None:
    """What to type to use all GPUs of this machine, if only one of several is used."""
    devices = torch.cuda.device_count()
    if devices < 2 or PartialState().num_processes > 1:
        return None
    return f"one of {devices} GPUs is used; for all: `accelerate launch --num_processes {devices} -m hfgpt train ...`"


WITHOUT_WORD = {
    "ACCELERATE_DYNAMO_MODE": ("dynamo_mode", "default"),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": ("dynamo_use_fullgraph", "false"),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": ("dynamo_use_dynamic", "false"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": ("dynamo_use_regional_compilation", "false"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("parallelism_config", "false"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", "false"),
    "FSDP_IGNORED_MODULES": ("fsdp_ignored_modules", ""),
    "ACCELERATE_DOWNCAST_BF16": ("downcast_bf16", "0"),
    "XLA_DOWNCAST_BF16": ("downcast_bf16", "0"),
    "XLA_USE_BF16": ("mixed_precision", "0"),
}
"""Variables that would change what a run computes or leaves, and that no recipe speaks of: what accelerate calls each,
and its value when nothing is asked for."""

ENGINES = {
    "--use_deepspeed": "ACCELERATE_USE_DEEPSPEED",
    "--use_fsdp": "ACCELERATE_USE_FSDP",
    "--use_megatron_lm": "ACCELERATE_USE_MEGATRON_LM",
}
"""Options that ask for an engine, and the variables that its processes get."""

PARTS = {
    "--use_deepspeed": ("zero_stage", "zero3_", "offload_", "deepspeed_"),
    "--use_fsdp": ("fsdp_",),
    "--use_megatron_lm": ("megatron_lm_",),
    "--use_parallelism_config": ("parallelism_config_",),
    "--mixed_precision fp8": ("fp8_",),
    "--tpu": ("downcast_bf16",),
}
"""Beginnings of the words that the launcher forgets, silently, without another one."""


def check_launcher(config: RunConfig) -> None:
    """Refuse what a launcher asks and the recipe denies; before anything is written.

    Raises:
        ValueError: naming both, and both ways out.
    """
    train, words = config.train, words_of_launcher()
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", PRECISIONS[train.precision]):
        change = "hfgpt does not train in that: " if precision == "fp8" else f"Set `train.precision={precision}`, or "
        raise ValueError(
            f"the launcher asks for `mixed_precision` {precision}, the recipe for `train.precision` {train.precision}. "
            f"{change}launch with `--mixed_precision no`."
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("no", "inductor" if train.compile is True else "no"):
        change = "Set `train.compile=true`" if backend == "inductor" else "Leave it to `train.compile` (inductor)"
        raise ValueError(
            f"the launcher asks for `dynamo_backend` {backend}, the recipe for `train.compile` "
            f"{str(train.compile).lower()}. {change}, or launch with `--dynamo_backend no`."
        )
    if train.compile is True and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        # A compiled model that accelerate (1.15) has split cannot be put together for a checkpoint: saving hangs.
        raise ValueError("`train.compile` does not go with FSDP2. Set `train.compile=false`, or launch without it.")
    engines = {"FSDP2": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
    for engine, variable in engines.items():
        if config.optim.name == "muon" and parse_flag_from_env(variable):
            raise ValueError(
                f"`optim.name` muon needs whole matrices, and {engine} takes them apart or steps by itself. Set "
                "`optim.name=adamw`, or launch without it."
            )
    # DeepSpeed alone gets these two; without it accelerate (1.15) drops them.
    for name, option, value, ignored in [
        ("gradient_accumulation_steps", "train.gradient_accumulation_steps", train.gradient_accumulation_steps, "1"),
        ("gradient_clipping", "optim.max_grad_norm", config.optim.max_grad_norm, "none"),
    ]:
        said = words.get(name, os.environ.get(f"ACCELERATE_{name.upper()}", "auto")).lower()
        if said not in ("auto", ignored) and float(said) != value:
            raise ValueError(
                f"the launcher asks for `{name}` {said}, the recipe for `{option}` {value}. Set `{option}={said}`, or "
                f"launch with `--{name} {value}`."
            )
    for variable, (name, default) in WITHOUT_WORD.items():
        said = os.environ.get(variable, default)
        if said.lower() != default:
            raise ValueError(
                f"the launcher asks for `{name}` ({variable} is {said}), which hfgpt does not drive. Leave it out, of "
                "the command line and of accelerate's configuration file."
            )
    there = {flag for flag, variable in ENGINES.items() if parse_flag_from_env(variable)}
    for flag, beginnings in PARTS.items():
        for word in words if flag not in there else ():
            if word.startswith(beginnings):
                raise ValueError(f"the launcher's `--{word}` has no effect without `{flag}`. Leave it out.")


def words_of_launcher() -> dict[str, str]:
    """The options on the command line of the `accelerate launch` that has started this process, and their values.

    Read from the command line itself, because the launcher hands on only what it has an environment variable for.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # every launcher of accelerate sets it
        return {}
    for parent in psutil.Process().parents():
        try:
            line = parent.cmdline()
        except psutil.Error:  # of another user, or gone
            continue
        start = next((at for at, word in enumerate(line) if is_launch(line[max(at - 1, 0)], word)), None)
        if start is not None:
            return options(line[start + 1 :])
    return {}


def is_launch(before: str, word: str) -> bool:
    """Whether a word of a command line, with the one before it, is accelerate's `launch`."""
    name = PurePath(word).name
    is_command = word == "launch" and PurePath(before).name in ("accelerate", "accelerate.commands.accelerate_cli")
    return is_command or name == "accelerate-launch" or word == "accelerate.commands.launch"


def options(line: list[str]) -> dict[str, str]:
    """The words that begin with two dashes, as accelerate spells them, each with its value, or the word after it."""
    found = {}
    for word, after in zip(line, [*line[1:], ""], strict=True):
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            found[name.replace("-", "_")] = value if has_value else after
    return found
