"""Optimizers, decay groups and schedules: one place, used by both loops."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, get_scheduler

from hfgpt.config.schema import OptimConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic polynomial that `orthogonalize` iterates; Jordan's, see `Muon`."""
MUON_MOMENTUM = 0.95


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that never do.

    Matrices and embeddings decay; vectors, which are the biases and the gains of the norms, do not.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, config: OptimConfig) -> Optimizer:
    """AdamW in torch's fused form, which walks each tensor once.

    Source:
        Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", https://arxiv.org/abs/1711.05101
    """
    groups = decay_groups(model, config.weight_decay)
    return AdamW(groups, lr=config.learning_rate, betas=averaging(config), fused=True)


def muon(model: PreTrainedModel, config: OptimConfig) -> Optimizer:
    """Muon on the matrices of the blocks, AdamW on embeddings, output layer, norms and biases.

    Raises:
        ValueError: the model has no such matrices.
    """
    matrices = block_matrices(model)
    chosen = {id(matrix) for matrix in matrices}
    groups = decay_groups(model, config.weight_decay)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        group["is_muon"] = False
    groups.append({"params": matrices, "weight_decay": config.weight_decay, "is_muon": True})
    groups[-1]["lr"] = config.muon_learning_rate
    # nanochat has no vectors, and torch (2.13) brings an empty group back from a checkpoint with its keys elsewhere.
    groups = [group for group in groups if group["params"]]
    return Muon(groups, lr=config.learning_rate, betas=averaging(config), fused=True)


def block_matrices(model: PreTrainedModel) -> list[Tensor]:
    """The weights of all trainable linear layers but the output layer.

    Raises:
        ValueError: there are none.
    """
    head = model.get_output_embeddings()
    found = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head and module.weight.requires_grad
    ]
    if not found:
        raise ValueError(
            f"`optim.name` is muon, and {type(model).__name__} has no `nn.Linear` to train but its output layer. "
            "Set `optim.name=adamw`."
        )
    return found


def averaging(config: OptimConfig) -> tuple[float, float]:
    first, second = config.betas
    return first, second


class Muon(AdamW):
    """AdamW, but for the groups of matrices with `is_muon`: their momentum, made orthogonal, is the step.

    torch has a Muon too (2.9 and newer). It is not this one because it optimizes nothing but matrices, while Trainer,
    checkpoints and schedules take one optimizer, and because it computes in bf16 whatever the weights are in, a matrix
    at a time: on two cores in twice the time of this one at the demo's size.

    Source:
        Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
        https://kellerjordan.github.io/posts/muon/
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients that there are; `closure` must be None."""
        assert closure is None
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["is_muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["is_muon"]:
                self.step_matrices(group)

    def step_matrices(self, group: dict[str, Any]) -> None:
        """One step of Muon; matrices of one shape are made orthogonal together."""
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for matrix in group["params"]:
            if matrix.grad is not None:
                by_shape[matrix.shape].append((matrix, matrix.grad))
        for (rows, columns), pairs in by_shape.items():
            updates = []
            for matrix, gradient in pairs:
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                    state["step"] = torch.zeros((), device=matrix.device)  # which AdamW looks for when it is loaded
                state["step"] += 1
                momentum = state["momentum_buffer"].lerp_(gradient, 1 - MUON_MOMENTUM)
                updates.append(gradient.lerp(momentum, MUON_MOMENTUM))  # Nesterov's
            scale = group["lr"] * max(1.0, rows / columns) ** 0.5
            for (matrix, _), update in zip(pairs, orthogonalize(torch.stack(updates)), strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)


def orthogonalize(matrices_NRC: Tensor, steps: int = 5) -> Tensor:
    """Give every matrix U S Vᵀ singular values near 1, between 0.7 and 1.2: about U Vᵀ.

    By the Newton-Schulz iteration X ← (a + b X Xᵀ + c (X Xᵀ)²) X, which is products alone. Its factors are polynomials
    of the first X Xᵀ, so they exchange their places: of a matrix that is twice as wide as high, or more, all products
    but the first and the last are of small square matrices.

    Args:
        matrices_NRC: (N, rows, columns).
        steps: of the iteration.

    Returns:
        (N, rows, columns) in the dtype of the argument. A matrix of zeros stays one.
    """
    if matrices_NRC.shape[1] > matrices_NRC.shape[2]:
        return orthogonalize(matrices_NRC.mT, steps).mT
    x = matrices_NRC / matrices_NRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram = x @ x.mT
    if x.shape[2] < 2 * x.shape[1]:
        for step in range(steps):
            x = newton_schulz_factor(gram if step == 0 else x @ x.mT) @ x
        return x
    product = factor = newton_schulz_factor(gram)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = newton_schulz_factor(gram)
        product = factor @ product
    return product @ x


def newton_schulz_factor(gram_NRR: Tensor) -> Tensor:
    """Compute a + b G + c G² of each matrix G."""
    first, second, third = NEWTON_SCHULZ
    factor = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=second, alpha=third)
    factor.diagonal(dim1=1, dim2=2).add_(first)
    return factor


OPTIMIZERS: dict[str, Callable[[Any, OptimConfig], Optimizer]] = {"adamw": adamw, "muon": muon}

# Our names and transformers'. All rise linearly from 0 over `warmup_steps`; all but constant then fall to 0: cosine and
# linear at once, wsd in a line over the last `decay_share` of the run.
SCHEDULES = {
    "constant": "constant_with_warmup",
    "cosine": "cosine",
    "linear": "linear",
    "wsd": "warmup_stable_decay",
}


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer that a recipe names."""
    return OPTIMIZERS[config.name](model, config)


def make_schedule(optimizer: Optimizer, config: OptimConfig, total_steps: int) -> LambdaLR:
    """Build the schedule that a recipe names, one call of `step()` per optimizer step.

    Args:
        optimizer: whose learning rates it sets.
        config: name of the schedule, and its warmup in steps, at most those of the run, and the share of its decay.
        total_steps: optimizer steps of the whole run.
    """
    assert config.warmup_steps <= total_steps
    options = None
    if config.schedule == "wsd":
        decay_steps = min(round(config.decay_share * total_steps), total_steps - config.warmup_steps)
        options = {"num_decay_steps": decay_steps, "decay_type": "linear"}
    return get_scheduler(
        SCHEDULES[config.schedule], optimizer, config.warmup_steps, total_steps, scheduler_specific_kwargs=options
    )
