"""Copies of hfgpt's model with one trap each, and the promises that each breaks: the one meant, then what follows.

Each trap is one that people met with models of their own.
"""

import torch
import torch.nn.functional as F
from torch import nn

from hfgpt import HFGPTConfig, HFGPTForCausalLM, HFGPTModel
from hfgpt.arguments import CACHE
from hfgpt.check.subject import Subject

BROKEN: dict[type, list[str]] = {}
"""Classes with the promises that they break: first the one meant for the trap, then those that follow of necessity."""

PADDED = ["left-padding-with-positions-changes-nothing", "left-padding-changes-nothing"]
PACKED = ["packed-documents-do-not-leak", "packed-documents-do-not-leak-by-default"]
CACHED = [
    "cached-logits-equal-uncached",
    "a-static-cache-gives-the-same-logits",
    "a-cache-follows-its-beams",
    "a-cache-can-be-cut",
    "cached-steps-of-padded-rows-equal-uncached",
]
GENERATED = [
    "generating-with-a-cache-changes-no-text",
    "generating-with-a-static-cache-changes-no-text",
    "batched-generation-equals-one-by-one",
    "beam-search-with-a-cache-changes-no-text",
    "a-seed-fixes-sampled-text",
]
LOADED = [
    "saved-and-loaded-is-the-same-to-the-bit",
    "weights-in-several-files-are-the-same",
    "dtype-of-the-file-is-kept",
    "no-pickle-is-written-and-nothing-is-fetched",
    "resizing-the-vocabulary-keeps-the-old-logits",
]


def breaks(*names):
    def register(model_class):
        BROKEN[model_class] = list(names)
        return model_class

    return register


def make_subject(model_class):
    values = {"vocab_size": 128, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
    no_dropout = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    is_tied = model_class is not HidesItsOutputLayer
    config = HFGPTConfig(**values, **no_dropout, tie_word_embeddings=is_tied)
    return Subject(model_class.__name__, model_class, config)


def length_of(arguments):
    cache = arguments.get(CACHE)
    return 0 if cache is None else int(cache.get_seq_length())


def causal(mask_BT, ahead=0):
    """What to add to scores, (B, 1, T, T), so that each token sees so many more than those before it."""
    length = mask_BT.shape[1]
    is_seen = torch.ones(length, length, dtype=torch.bool).tril(ahead)[None, None] & (mask_BT[:, None, None] == 1)
    return torch.zeros(is_seen.shape).masked_fill(~is_seen, torch.finfo(torch.float32).min)


@breaks(
    "changing-a-token-leaves-earlier-logits",
    "left-padding-changes-nothing",
    *PACKED,
    *CACHED,
    *(name for name in GENERATED if name != "batched-generation-equals-one-by-one"),
)
class SeesTheNextToken(HFGPTForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, **arguments):
        if input_ids is not None and arguments.get(CACHE) is None:
            attention_mask = causal(torch.ones_like(input_ids) if attention_mask is None else attention_mask, ahead=1)
        return super().forward(input_ids, attention_mask, **arguments)


@breaks("left-padding-changes-nothing")
class CountsPaddingAsPositions(HFGPTForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **arguments):
        if position_ids is None and input_ids is not None:
            begin = length_of(arguments)
            position_ids = torch.arange(begin, begin + input_ids.shape[1]).expand(input_ids.shape[0], -1)
        return super().forward(input_ids, attention_mask, position_ids, **arguments)


@breaks(*PADDED, "cached-steps-of-padded-rows-equal-uncached", "packed-documents-do-not-leak-by-default")
class SeesPadding(HFGPTForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **arguments):
        if attention_mask is not None and input_ids is not None:
            if position_ids is None:
                position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
            if arguments.get(CACHE) is None:
                attention_mask = causal(torch.ones_like(attention_mask))
        return super().forward(input_ids, attention_mask, position_ids, **arguments)


@breaks(*PACKED)
class LetsDocumentsSeeEachOther(HFGPTForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **arguments):
        if position_ids is not None and input_ids is not None and arguments.get(CACHE) is None:
            attention_mask = causal(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        return super().forward(input_ids, attention_mask, position_ids, **arguments)


@breaks(*CACHED, *GENERATED)
class ForgetsTheFirstToken(HFGPTForCausalLM):
    def forward(self, input_ids=None, **arguments):
        if length_of(arguments):
            for layer in arguments[CACHE].layers:
                layer.values[:, :, 0] = 0
        return super().forward(input_ids, **arguments)


@breaks("more-tokens-than-positions-are-refused-or-harmless")
class RepeatsItsLastPosition(HFGPTForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **arguments):
        last = self.config.max_position_embeddings - 1
        if input_ids is not None and input_ids.shape[1] > last + 1:
            position_ids = torch.arange(input_ids.shape[1]).clamp(max=last)[None]
            attention_mask = causal(torch.ones_like(input_ids))
        return super().forward(input_ids, attention_mask, position_ids, **arguments)


@breaks("dropout-is-off-in-eval")
class DropsInEval(HFGPTForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.norm.register_forward_hook(lambda module, _, x_BTC: F.dropout(x_BTC, p=self.config.embd_pdrop))


class BodyDrawnAnew(HFGPTModel):
    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(std=0.02)
        if getattr(module, "bias", None) is not None:
            module.bias.data.zero_()


@breaks("loading-overwrites-no-weight")
class DrawsLoadedWeightsAnew(HFGPTForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = BodyDrawnAnew(config)
        self.post_init()


@breaks("saved-and-loaded-is-the-same-to-the-bit")
class LosesABuffer(HFGPTForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)

    def forward(self, *args, **arguments):
        output = super().forward(*args, **arguments)
        output.logits = output.logits * self.scale
        return output


@breaks("tied-weights-stay-tied", *LOADED)  # hfgpt refuses to load it
class IsNotTied(HFGPTForCausalLM):
    _tied_weights_keys = None


class BodyDrawnTooLarge(HFGPTModel):
    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=1.0)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


@breaks("initial-weights-are-as-declared")
class DrawsTooLargeWeights(HFGPTForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = BodyDrawnTooLarge(config)
        self.post_init()


@breaks("resizing-the-vocabulary-keeps-the-old-logits")
class HidesItsOutputLayer(HFGPTForCausalLM):
    def get_output_embeddings(self):
        return None


@breaks("sdpa-gives-the-same-logits-as-eager", "flex-attention-gives-the-same-logits-as-eager")
class ScalesEagerOtherwise(HFGPTForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        if config._attn_implementation == "eager":
            for block in self.model.layers:
                block.self_attn.q_proj.register_forward_hook(lambda module, _, q: q * 1.1)


@breaks(
    "a-row-does-not-depend-on-its-neighbours",
    *PADDED,
    "right-padding-changes-nothing",
    "batched-generation-equals-one-by-one",
    "sdpa-gives-the-same-logits-as-eager",
    "flex-attention-gives-the-same-logits-as-eager",
)
class MixesRows(HFGPTForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.norm.register_forward_hook(lambda module, _, x_BTC: x_BTC - 0.1 * x_BTC.mean(0, keepdim=True))
