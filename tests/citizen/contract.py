"""The classes that the contract holds for, and how to look at their outputs alike."""

import pytest
import torch
from torch import Tensor, nn

import hfgpt
from hfgpt.arguments import CACHE
from hfgpt.modeling_hfgpt import AUTO_CLASSES
from hfgpt.modeling_nanochat import NanoChatForCausalLM, NanoChatModel

NANOCHAT_CLASSES = {NanoChatModel: "NanoChatModel", NanoChatForCausalLM: "NanoChatForCausalLM"}
"""Each with the name of transformers' own."""
ALL_CLASSES = [*AUTO_CLASSES.values(), *NANOCHAT_CLASSES]
TOKEN_CLASSES = [each for each in ALL_CLASSES if each is not hfgpt.HFGPTForSequenceClassification]
"""Those that score every token, and not only a row's last."""

GPT2_CLASSES = {
    hfgpt.HFGPTModel: "GPT2Model",
    hfgpt.HFGPTForCausalLM: "GPT2LMHeadModel",
    hfgpt.HFGPTForSequenceClassification: "GPT2ForSequenceClassification",
    hfgpt.HFGPTForTokenClassification: "GPT2ForTokenClassification",
    hfgpt.HFGPTForQuestionAnswering: "GPT2ForQuestionAnswering",
}
REFERENCE_CLASSES = {**GPT2_CLASSES, **NANOCHAT_CLASSES}
"""Each class with the one of transformers that computes the same."""

# transformers passes the flag, which torch 2.11 has deprecated, when it makes flex_attention's mask.
flex_mask_warning = pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
# On a machine without a C++ compiler, torch can run it uncompiled only; see the fixture `uncompiled`.
flex_uncompiled_warning = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")

SUM_ORDER = {"rtol": 0, "atol": 1e-5}
"""For what is the same mathematics added up in another order, at activations of size one to ten in fp32."""


def draw_parameters(model: nn.Module) -> None:
    """Draw every parameter, biases and gains too: with zeros and ones, swapped norms or biases would go unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(mean=float(is_gain), std=0.1, generator=generator)


def scores(output) -> Tensor:
    """What the model says of each token (B, T, any), or of each row (B, any)."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.logits if "logits" in output else output.last_hidden_state


def cache_of(output):
    """The cache in an output, under the name of the installed transformers; None if there is none."""
    return output.get(CACHE)


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Ids from 1, since 0 pads here."""
    return torch.randint(1, 320, (rows, length), generator=torch.Generator().manual_seed(seed))


def pad(ids: Tensor, lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    """Hide all but the first `lengths` ids of each row behind padding: the new ids and their mask."""
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        kept = slice(0, length) if side == "right" else slice(ids.shape[1] - length, None)
        padded[row, kept], mask[row, kept] = ids[row, :length], 1
    return padded, mask


def make_labels(model_class: type, ids: Tensor) -> dict[str, Tensor]:
    """Labels for `ids` that give `model_class` a loss; none for the one that has no loss."""
    rows, length = ids.shape
    if model_class in (hfgpt.HFGPTForCausalLM, NanoChatForCausalLM):
        return {"labels": ids}
    if model_class is hfgpt.HFGPTForSequenceClassification:
        return {"labels": torch.arange(rows) % 3}
    if model_class is hfgpt.HFGPTForTokenClassification:
        return {"labels": ids % 3}
    if model_class is hfgpt.HFGPTForQuestionAnswering:
        return {"start_positions": torch.arange(rows), "end_positions": torch.arange(rows) + length // 2}
    return {}
