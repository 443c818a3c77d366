"""Loss and perplexity of a causal language model over rows of tokens, as training makes them.

One pass, every target once, no logits kept. Loss is in nats per token, the mean over all targets.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from hfgpt.distributed.sharding import is_sharded
from hfgpt.evaluation.perplexity import e_to
from hfgpt.loss import IGNORE_INDEX


@dataclass(frozen=True)
class Score:
    """What an evaluation found.

    Attributes:
        loss: nats per token, the mean over `tokens` targets.
        tokens: targets scored, over all processes.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """E to the loss; infinite where that is beyond floating point, NaN where the loss is."""
        return e_to(self.loss)


@torch.no_grad()
def score_batches(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Score:
    """Score every target of `batches` once, in eval mode; the model's mode is as it was afterwards.

    Args:
        model: an `HFGPTForCausalLM`, or another causal language model of transformers.
        batches: `input_ids`, `shift_labels` and perhaps `position_ids`, each (B, T), as made by
            `hfgpt.data.loaders.collate`. On several processes each gives its own part; the score is that of all.

    Returns:
        The mean loss, summed in fp64.

    Raises:
        ValueError: there is no target at all.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    # fp64, because a corpus adds up millions of fp32 losses; MPS has no fp64, so the sum lives on the CPU.
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    try:
        for batch in batches:
            targets = batch["shift_labels"]
            batch_tokens = int((targets != IGNORE_INDEX).sum())
            if batch_tokens or is_sharded(model):
                inputs = {
                    name: each.to(device) for name, each in batch.items() if name in ("input_ids", "position_ids")
                }
                total += sum_loss(model, inputs, targets.to(device)).double().cpu()
                tokens += batch_tokens
    finally:
        model.train(was_training)
    if PartialState().num_processes > 1:
        sums = reduce(torch.stack([total, torch.tensor(float(tokens), dtype=torch.float64)]).to(device), "sum")
        total, tokens = sums[0], int(sums[1])
    if not tokens:
        raise ValueError("there is nothing to score: no row holds a target.")
    return Score(float(total) / tokens, tokens)


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
