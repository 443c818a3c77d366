"""The named tensors of a file, taken out of whatever a program has wrapped them in; the same for every format."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hfgpt.weights.lazy_tensors import LazyTensor

CONTAINERS = ("model", "model_state_dict", "state_dict", "module")
"""What a file may keep its tensors under, beside the optimizer's and more: nanoGPT, LLMs-from-scratch, Lightning and
DeepSpeed."""

WRAPPERS = (
    *("module", "_forward_module"),  # DistributedDataParallel and DeepSpeed; Lightning Fabric
    *("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),  # torch.compile, FSDP, activation checkpoints
)
"""Parts of names that stand for a module around the model or around one of its blocks; no format has them itself."""

EMBEDDINGS = (
    *("transformer.wte.weight", "wte.weight"),  # GPT-2, nanoGPT, minGPT
    *("model.embed_tokens.weight", "embed_tokens.weight"),  # hfgpt
    "tok_emb.weight",  # LLMs-from-scratch
)
"""Names of the token embedding, by which the beginning of a model's names is found; the longer before the shorter."""


def state_dict_in(content: dict[Any, Any]) -> dict[Any, Any]:
    """The dictionary of tensors in what a file holds: its content itself, or what lies there under a usual name."""
    return next((content[name] for name in CONTAINERS if isinstance(content.get(name), dict)), content)


def unwrap(tensors: Mapping[Any, Any]) -> tuple[dict[Any, Any], list[str]]:
    """Take the names of modules around the model off the names of its tensors, and note which.

    Raises:
        ValueError: two tensors would have the same name.
    """
    names = {name: ".".join(part for part in str(name).split(".") if part not in WRAPPERS) for name in tensors}
    around = dict.fromkeys(part for name in tensors for part in str(name).split(".") if part in WRAPPERS)
    for embedding in EMBEDDINGS:
        found = [name for name in names.values() if f".{name}".endswith(f".{embedding}")]
        if found:
            prefix = found[0].removesuffix(embedding)
            names = {name: inside.removeprefix(prefix) for name, inside in names.items()}
            around |= {prefix.removesuffix("."): None} if prefix else {}
            break
    if not around:
        return dict(tensors), []
    twice = [name for name, times in Counter(names.values()).items() if times > 1]
    if twice:
        raise ValueError(f"{twice[0]}: in the file more than once, within {' and '.join(map(repr, around))}.")
    note = f"taken off the names of the tensors: {', '.join(f'`{part}.`' for part in around)}"
    return {names[name]: each for name, each in tensors.items()}, [note]


def check_tensors(tensors: Mapping[Any, Any]) -> dict[str, LazyTensor | Tensor]:
    """The same, once every name and value is known to be a tensor's.

    Raises:
        ValueError: something has no name or is no tensor.
    """
    for name, tensor in tensors.items():
        if not (isinstance(name, str) and isinstance(tensor, LazyTensor | Tensor)):
            raise ValueError(f"{name!r}: a {type(tensor).__name__}, where named tensors were to be expected.")
    return dict(tensors)
