"""What the promises about training share: labels, one step's gradients, and models without randomness."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

IGNORE_INDEX = -100
ROUNDING = 1e-4
"""What fp32 sums in another order may differ by, relative to the norm of all gradients of a small model: 2^-24 a
rounding, times the square root of the some thousand terms of a sum, times the layers they pass."""


def ragged_labels(ids: Tensor) -> Tensor:
    """Labels (B, T) for `ids` with another number of targets in each row, as prompts and padding leave them."""
    labels = ids.clone()
    for row in range(len(ids)):
        labels[row, : 3 * row] = IGNORE_INDEX
    labels[0, -2:] = IGNORE_INDEX
    return labels


def count_targets(labels: Tensor) -> int:
    """The tokens of `labels` (B, T) that a prediction is made of: a row's first has nothing before it."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def next_token_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """The mean cross-entropy of each next token of `labels` (B, T) by `logits` (B, T, V), in fp64."""
    scores = logits[:, :-1].double().flatten(0, 1)
    targets = labels[:, 1:].flatten()
    return F.cross_entropy(scores, targets, ignore_index=IGNORE_INDEX, label_smoothing=smoothing)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter that has one, by the parameter's name."""
    names = ((name.removeprefix("_orig_mod."), parameter.grad) for name, parameter in model.named_parameters())
    return {name: gradient for name, gradient in names if gradient is not None}


def learn(model: nn.Module, *batches: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """The gradients of the summed losses of `batches`, with the same dropout for the same seed."""
    torch.manual_seed(seed)
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    return {name: gradient.clone() for name, gradient in gradients_of(model).items()}


def relative_distance(these: dict[str, Tensor], those: dict[str, Tensor]) -> float:
    """‖these - those‖ / ‖those‖ over all tensors; infinite where the two have other names."""
    if these.keys() != those.keys():
        return float("inf")
    distance = sum((these[name].double() - tensor.double()).square().sum() for name, tensor in those.items())
    norm = sum(tensor.double().square().sum() for tensor in those.values())
    return float(distance / norm) ** 0.5


def worst_tensor(these: dict[str, Tensor], those: dict[str, Tensor]) -> str:
    """The name under which the two differ most: the tensor to look at first."""
    missing = sorted(these.keys() ^ those.keys())
    if missing:
        return missing[0]
    return max(those, key=lambda name: float((these[name] - those[name]).norm()))


def set_dropout(model: PreTrainedModel, probability: float) -> PreTrainedModel:
    """Set every dropout of `model`: layers, numbers that a module keeps, and fields of the config."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = probability
        for holder in (module, getattr(module, "config", None)):
            for name in dropout_names(holder):
                setattr(holder, name, probability)
    return model


def dropout_names(holder: Any) -> list[str]:
    """The numbers of a module or a config that are called after dropout."""
    fields = vars(holder) if hasattr(holder, "__dict__") else {}
    return [name for name, value in fields.items() if "drop" in name and isinstance(value, float)]
