"""Copies of hfgpt's model that are each broken in one way: what people get wrong in losses, training and tools.

Each keeps the class's name, by which transformers chooses losses and tables.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

import hfgpt
from hfgpt.gpt import Block
from hfgpt.modeling_hfgpt import HFGPTBlock

right_forward = hfgpt.HFGPTForCausalLM.forward


def named(**members: Any) -> type:
    """hfgpt's class with other members, under its own name."""
    return type("HFGPTForCausalLM", (hfgpt.HFGPTForCausalLM,), {"__module__": __name__, **members})


def with_loss(loss_of: Callable) -> type:
    """The class with another loss: `loss_of(logits, labels, num_items_in_batch=…, shift_labels=…)`."""

    @wraps(right_forward)
    def forward(self, *args, labels=None, num_items_in_batch=None, shift_labels=None, **kwargs):
        output = right_forward(self, *args, **kwargs)
        if labels is not None:
            output.loss = loss_of(
                output.logits, labels, num_items_in_batch=num_items_in_batch, shift_labels=shift_labels
            )
        return output

    return named(forward=forward)


def right_loss(logits, labels, **kwargs):
    return ForCausalLMLoss(logits, labels, vocab_size=logits.shape[-1], **kwargs)


def with_blocks(block: type) -> type:
    """The class with other blocks."""

    def __init__(self, config):
        hfgpt.HFGPTForCausalLM.__init__(self, config)
        for each in self.model.layers:
            each.__class__ = block

    return named(__init__=__init__)


def changed(change: Callable) -> type:
    """The class after `change(model)` has been done to each new model."""

    def __init__(self, config):
        hfgpt.HFGPTForCausalLM.__init__(self, config)
        change(self)

    return named(__init__=__init__)


def unshifted_loss(logits, labels, num_items_in_batch=None, **kwargs):
    return right_loss(logits, labels, num_items_in_batch=num_items_in_batch, shift_labels=labels)


def mean_whatever_trainer_says(logits, labels, num_items_in_batch=None, **kwargs):
    return right_loss(logits, labels, **kwargs)


def mean_over_every_label(logits, labels, num_items_in_batch=None, shift_labels=None):
    loss = right_loss(logits, labels, num_items_in_batch=1, shift_labels=shift_labels)
    return loss / (labels[:, 1:].numel() if num_items_in_batch is None else num_items_in_batch)


def loss_that_shifts_always(logits, labels, num_items_in_batch=None, shift_labels=None):
    return right_loss(logits, labels, num_items_in_batch=num_items_in_batch)


class HalfGradientWhenCompiled(torch.autograd.Function):
    """Its backward pass asks how it is run."""

    @staticmethod
    def forward(ctx, loss):
        ctx.factor = 0.5 if torch.compiler.is_compiling() else 1.0
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor


def loss_for_eager_mode_only(logits, labels, **kwargs):
    return HalfGradientWhenCompiled.apply(right_loss(logits, labels, **kwargs))


def loss_that_looks_at_itself(logits, labels, **kwargs):
    loss = right_loss(logits, labels, **kwargs)
    return loss if loss.item() < 1e9 else loss * 0


def block_with(forward: Callable) -> type:
    """A block with another `forward`, which transformers does not wrap in checkpointing of its own."""
    block = type("HFGPTBlock", (HFGPTBlock,), {"__call__": nn.Module.__call__})
    block.forward = forward  # after the class is made: transformers wraps what it finds then
    return block


def checkpoints(block: nn.Module) -> bool:
    return block.gradient_checkpointing and block.training


def forget_dropout(self, x_BTC, **kwargs):
    """Checkpointed, it draws other dropout masks the second time."""
    if not checkpoints(self):
        return Block.forward(self, x_BTC, **kwargs)
    call = partial(Block.forward, self, **kwargs)
    return torch.utils.checkpoint.checkpoint(call, x_BTC, use_reentrant=False, preserve_rng_state=False)


def forget_the_mask(self, x_BTC, attention_mask=None, **kwargs):
    """Checkpointed, it is called without the mask."""
    if not checkpoints(self):
        return Block.forward(self, x_BTC, attention_mask=attention_mask, **kwargs)
    call = partial(Block.forward, self, attention_mask=None, **kwargs)
    return torch.utils.checkpoint.checkpoint(call, x_BTC, use_reentrant=False)


def ignore_checkpointing(self, x_BTC, **kwargs):
    """It says that it can be checkpointed, and is not."""
    return Block.forward(self, x_BTC, **kwargs)


CALLS = [0]


def remember_calls(self, x_BTC, **kwargs):
    """In training it scales by a number that goes on from model to model."""
    if self.training:
        CALLS[0] += 1
        x_BTC = x_BTC * (1 + 0.001 * CALLS[0])
    return Block.forward(self, x_BTC, **kwargs)


class NormThatOverflows(nn.LayerNorm):
    """Under autocast it passes through fp16, in a scale that does not fit there."""

    def forward(self, x):
        if torch.is_autocast_enabled("cpu"):
            x = (x.half() * 1e5).float()
        return super().forward(x)


class LinearWithMemory(nn.Linear):
    """It keeps the weights with which it first generated."""

    def forward(self, x):
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        if not hasattr(self, "first_weight"):
            object.__setattr__(self, "first_weight", self.weight.detach().clone())
        return F.linear(x, self.first_weight, self.bias)


def overflow(model):
    model.model.norm.__class__ = NormThatOverflows


def remember_weights(model):
    for block in model.model.layers:
        block.self_attn.v_proj.__class__ = LinearWithMemory


def add_unused_layer(model):
    model.unused = nn.Linear(4, 4)


def name_no_block(model):
    model._no_split_modules = {"GPT2Block"}


class WithoutLossType(with_loss(right_loss)):
    """What it is if `ForCausalLM` is not in the class's name."""

    def __init__(self, config):
        super().__init__(config)
        self.loss_type = None


WithoutLossType.__name__ = WithoutLossType.__qualname__ = "HFGPTForCausalLM"


class ForgetfulConfig(hfgpt.HFGPTConfig):
    """It does not write one of its fields."""

    def to_dict(self):
        fields = super().to_dict()
        fields.pop("layer_norm_epsilon", None)
        return fields


@wraps(right_forward)
def forward_for_short_texts(self, input_ids=None, **kwargs):
    if input_ids is not None and input_ids.shape[1] > 15:
        input_ids = input_ids.clone()
    return right_forward(self, input_ids, **kwargs)


BROKEN = {
    "loss-is-next-token": [with_loss(unshifted_loss)],
    "loss-ignores-minus-100": [with_loss(mean_over_every_label)],
    "loss-honours-num-items": [with_loss(mean_whatever_trainer_says)],
    "loss-honours-shift-labels": [with_loss(loss_that_shifts_always)],
    "accumulation-is-one-batch": [named(accepts_loss_kwargs=False)],
    "trainer-is-a-plain-loop": [WithoutLossType],
    "checkpointing-is-exact": [
        with_blocks(block_with(forget_dropout)),
        with_blocks(block_with(forget_the_mask)),
        with_blocks(block_with(ignore_checkpointing)),
    ],
    "training-is-repeatable": [with_blocks(block_with(remember_calls))],
    "every-parameter-learns": [changed(add_unused_layer)],
    "bf16-autocast-learns-alike": [changed(overflow)],
    "compiled-step-is-one-graph": [with_loss(loss_that_looks_at_itself)],
    "compiled-gradients-are-eager": [with_loss(loss_for_eager_mode_only)],
    "peft-merge-is-exact": [changed(remember_weights)],
    "embeddings-are-named": [named(get_output_embeddings=lambda self: self.model.embed_tokens)],
    "blocks-stay-on-one-device": [changed(name_no_block)],
    "export-takes-any-size": [named(forward=forward_for_short_texts)],
}
"""Broken copies by the promise that each of them breaks."""
