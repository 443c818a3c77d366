"""A stranger's checkpoint: its tensors under the module's own names, and the config that lies beside them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfgpt.weights.lazy_tensors import LazyTensor, in_pickle, in_safetensors, read
from hfgpt.weights.state_dict import WRAPPERS

CONFIGS = ("model_args", "model_config", "config", "cfg", "hyper_parameters", "hparams", "args", "gpt_config")
"""What programs call the model's config in a checkpoint; nanoGPT's `config` is that of the run, so it comes later."""


class Fields:
    """Stands in for a config class in a pickle; it holds what was stored and runs nothing."""


def read_checkpoint(path: Path, config_classes: set[str]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The named tensors of a file, and the config beside them, if there is one.

    Args:
        path: what `torch.save` wrote, or a safetensors file.
        config_classes: names of classes whose pickled objects are read as their fields; nothing of them is run.

    Raises:
        ValueError: it is damaged, wants to run something, or holds no tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file.")
    if path.suffix == ".safetensors":
        return dict(in_safetensors(path)), None
    content = read_pickle(path, config_classes)
    tensors = find_tensors(content)
    if not tensors:
        raise ValueError(f"{path}: there are no named tensors in it.")
    found = (
        next((plain(content[name]) for name in CONFIGS if name in content), None) if content is not tensors else None
    )
    return tensors, found if isinstance(found, dict) else None


def read_pickle(path: Path, config_classes: set[str]) -> dict[Any, Any]:
    """What is in a file, with plain fields in the place of configs.

    Raises:
        ValueError: it is damaged, or wants to run something.
    """
    stand_ins: list[Any] = []
    while True:
        try:
            content: Any = in_pickle(path, stand_ins)
            break
        except ValueError as error:
            wanted = re.search(r"it wants to run (\S+?)\.?$", str(error))
            name = wanted.group(1) if wanted else ""
            known = {each for _, each in stand_ins}
            if not wanted or name in known or name.rpartition(".")[2] not in {*config_classes, "Namespace"}:
                remedy = (
                    " Save it again without that object: `torch.save({'model': model.state_dict(), 'config': "
                    "vars(model.config)}, 'weights.pt')`."
                )
                raise ValueError(f"{error}{remedy if wanted else ''}") from error
            stand_ins.append((type(Fields.__name__, (Fields,), {}), name))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, where a state dict was to be expected.")
    return content


def find_tensors(content: Mapping[Any, Any]) -> dict[str, Any]:
    """The dictionary of named tensors: the content itself, or the largest one directly in it."""
    is_tensor = (Tensor, LazyTensor)
    if content and all(isinstance(each, is_tensor) for each in content.values()):
        return dict(content)
    inner = [each for name, each in content.items() if isinstance(each, dict) and "optim" not in str(name)]
    found = [{str(name): each for name, each in one.items() if isinstance(each, is_tensor)} for one in inner]
    found += [{str(name): each for name, each in content.items() if isinstance(each, is_tensor)}]
    return max(found, key=len, default={})


def plain(value: Any) -> Any:
    """A config as dictionaries."""
    if isinstance(value, Fields):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    return value


def fit(tensors: Mapping[str, Any], module: nn.Module, source: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the module's own names, and what was done to get there.

    Raises:
        ValueError: one is missing, left over, or of another shape; or tied tensors differ.
    """
    here = module.state_dict()
    named, notes = rename(tensors, set(here), source)
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    ties = tied_names(module)
    missing = {name for name in here if name not in named}
    absent_buffers = sorted(missing - parameters)
    filled = {name for group in ties for name in group if any(other in named for other in group)}
    faults = [f"{name}: not in the file" for name in sorted(missing & parameters - filled)]
    faults += [f"{name}: in the file, not in the module" for name in sorted(named.keys() - here.keys())]
    faults += [
        f"{name}: in the file {tuple(named[name].shape)}, in the module {tuple(here[name].shape)}"
        for name in sorted(named.keys() & here.keys())
        if tuple(named[name].shape) != tuple(here[name].shape)
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(
            f"{source}: the weights do not fit the module. {faults[0]}{more}. Is the config the right one?"
        )
    result = {name: read(named[name]) for name in named}
    for group in ties:
        given = [name for name in group if name in result]
        for name in given[1:]:
            if not torch.equal(result[given[0]], result[name]):
                raise ValueError(
                    f"{source}: {given[0]} and {name} differ, and the module ties them. Which is right? Leave one out."
                )
        result |= {name: result[given[0]] for name in group if given}
    if absent_buffers:
        notes.append(f"buffers that the file lacks are those the constructor makes: {', '.join(absent_buffers)}")
    return result | {name: here[name] for name in absent_buffers}, notes


def rename(tensors: Mapping[str, Any], here: set[str], source: Path) -> tuple[dict[str, Any], list[str]]:
    """Take off what compilers, trainers and modules around the module put before its names."""
    without = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in tensors}
    bare_here = {".".join(part for part in name.split(".") if part not in WRAPPERS): name for name in here}
    if len(set(without.values())) < len(without):
        raise ValueError(f"{source}: without the names of wrappers ({', '.join(WRAPPERS)}) some tensors have one name.")
    if set(tensors) <= here:
        return dict(tensors), []
    prefixes = {
        name.removesuffix(own) for name in without.values() for own in bare_here
        if name == own or name.endswith(f".{own}")
    }  # fmt: skip
    most = {prefix: sum(prefix + own in without.values() for own in bare_here) for prefix in prefixes}
    best = [prefix for prefix, count in most.items() if count == max(most.values())]
    if not best:
        return dict(tensors), []
    if len(best) > 1:
        raise ValueError(
            f"{source}: holds the weights {len(best)} times, under {' and '.join(map(repr, sorted(best)))}. "
            "Leave those that are meant in a file of their own."
        )
    prefix = best[0]
    named, left_over = {}, []
    for name, bare in without.items():
        own = bare.removeprefix(prefix)
        if bare.startswith(prefix):
            named[bare_here.get(own, own)] = tensors[name]
        else:
            left_over.append(name)
    around = dict.fromkeys(part for name in tensors for part in name.split(".") if part in WRAPPERS)
    taken_off = [f"`{part}.`" for part in around] + ([f"`{prefix}`"] if prefix else [])
    notes = [f"taken off the names of the tensors: {', '.join(taken_off)}"] if taken_off else []
    if left_over:
        notes.append(f"left in the checkpoint, outside `{prefix}`: {', '.join(sorted(left_over))}")
    return named, notes


def tied_names(module: nn.Module) -> list[list[str]]:
    """Groups of names that stand for one parameter: of the same place in memory, shape and strides."""
    groups: dict[Any, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        key = (parameter.untyped_storage().data_ptr(), parameter.storage_offset(), parameter.shape, parameter.stride())
        groups.setdefault(key if parameter.numel() else name, []).append(name)
    return [names for names in groups.values() if len(names) > 1]
