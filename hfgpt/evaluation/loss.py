"""Loss and perplexity of a causal language model over batches of tokens: the scorer of training and of `evaluate`.

One pass, every target once; no logits of a whole batch are kept of an hfgpt model. Loss is in nats per token.

Shape letters: B rows, T tokens in each, K the last positions of a row, N targets, V vocabulary.
"""

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from hfgpt.distributed.sharding import is_sharded
from hfgpt.loss import IGNORE_INDEX
from hfgpt.modeling_hfgpt import HFGPTForCausalLM

SCORED_AT_ONCE = 512
"""Targets whose logits exist at a time: with fewer the matrix product loses speed, with more memory grows."""


@dataclass(frozen=True)
class Score:
    """Token losses added up, from which all else follows.

    Attributes:
        tokens: targets scored, over all processes.
        total: sum of their losses, in nats.
        squares: sum of the squares of their losses; None where single losses are not known.
    """

    tokens: int
    total: float
    squares: float | None = None

    def __add__(self, other: "Score") -> "Score":
        """The score of both; without single losses."""
        return Score(self.tokens + other.tokens, self.total + other.total)

    @property
    def loss(self) -> float:
        """Nats per token.

        Raises:
            ValueError: there is no target at all.
        """
        if not self.tokens:
            raise ValueError("there is nothing to score: no row holds a target.")
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        """E to the loss; infinite where that is beyond floating point, NaN where the loss is."""
        return e_to(self.loss)

    @property
    def standard_error(self) -> float | None:
        """Of the loss, as if token losses were independent: neighbours are alike, so it is a little small."""
        if self.squares is None or self.tokens < 2:
            return None
        variance = max(0.0, self.squares - self.total**2 / self.tokens) / (self.tokens - 1)
        return math.sqrt(variance / self.tokens)


@torch.no_grad()
def score_batches(model: nn.Module, batches: Iterable[dict[str, Tensor]], each_token: bool = False) -> Score:
    """Score every target of `batches` once, in eval mode; the model's mode is as it was afterwards.

    Args:
        model: an `HFGPTForCausalLM`, or another causal language model of transformers.
        batches: `input_ids` (B, T), `shift_labels` (B, T), or (B, K) with `each_token`, and perhaps `position_ids`, as
            made by `hfgpt.data.loaders.collate`. On several processes each gives its own part; the score is that of
            all.
        each_token: whether to compute every single loss, for the standard error. Otherwise the model's own forward
            pass adds up those of a batch, which also works where the model is sharded.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    # fp64, because a corpus adds up millions of fp32 losses; MPS has no fp64, so the sums live on the CPU.
    sums = torch.zeros(3, dtype=torch.float64)
    try:
        for batch in batches:
            targets = batch["shift_labels"]
            tokens = (targets != IGNORE_INDEX).sum()
            if tokens or is_sharded(model):
                inputs = {
                    name: each.to(device) for name, each in batch.items() if name in ("input_ids", "position_ids")
                }
                score = token_losses if each_token else sum_loss
                losses = score(model, inputs, targets.to(device)).cpu().double()
                sums += torch.stack([tokens.cpu().double(), losses.sum(), losses.square().sum()])
    finally:
        model.train(was_training)
    if PartialState().num_processes > 1:
        sums = reduce(sums.to(device), "sum")
    count, total, squares = sums.tolist()
    return Score(int(count), total, squares if each_token else None)


def sum_loss(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Sum of the losses of one batch, in nats: hfgpt makes it without all logits, other models by theirs."""
    # `labels` stand for nothing beside `shift_labels`, but without them transformers' models make no loss.
    return model(
        **inputs,
        labels=inputs["input_ids"],
        shift_labels=targets,
        num_items_in_batch=1,
        skip_logits=True,
        use_cache=False,
    ).loss


@torch.no_grad()
def token_losses(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Loss of each target, in nats.

    Args:
        model: any causal language model, in eval mode.
        inputs: `input_ids` (B, T) and what else the model takes, on its device.
        targets: (B, K) ids after the last K of them, or `IGNORE_INDEX`.

    Returns:
        (N,) in fp32, whatever the model computes in; of an hfgpt model without ever holding all logits.
    """
    kept = targets.shape[1]
    head: nn.Module = nn.Identity()
    if isinstance(model, HFGPTForCausalLM):
        states, head = model.model(**inputs, use_cache=False).last_hidden_state, model.lm_head
    else:
        known = inspect.signature(model.forward).parameters
        options: dict[str, Any] = {"use_cache": False, "logits_to_keep": kept}
        states = model(**inputs, **{name: value for name, value in options.items() if name in known}).logits
    states, targets = states[:, -kept:].flatten(0, 1), targets.flatten()
    losses = []
    for start in range(0, len(targets), SCORED_AT_ONCE):
        chunk = slice(start, start + SCORED_AT_ONCE)
        is_target = targets[chunk] != IGNORE_INDEX
        losses.append(cross_entropies_(head(states[chunk][is_target]).float(), targets[chunk][is_target]))
    return torch.cat(losses)


def cross_entropies_(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy of each target (N,), in nats; the logits are overwritten, so that no other matrix is needed."""
    target_N1 = logits_NV.gather(1, targets_N[:, None])
    max_N1 = logits_NV.amax(dim=1, keepdim=True)
    sum_N1 = logits_NV.sub_(max_N1).exp_().sum(dim=1, keepdim=True)
    return (sum_N1.log() + max_N1 - target_N1)[:, 0]


def e_to(nats: float) -> float:
    """E to the power of `nats`; infinite where that is beyond floating point."""
    return math.inf if nats > 700 else math.exp(nats)
