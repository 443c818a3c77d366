"""Models in manners of their own: what does not arise for them is not called broken, and nothing is made up."""

import pytest
import torch.nn.functional as F

from hfgpt import HFGPTConfig, HFGPTForCausalLM
from hfgpt.arguments import CACHE
from hfgpt.check import check
from hfgpt.check.small import dropout_fields
from hfgpt.check.subject import Subject


class DropsForCausalLM(HFGPTForCausalLM):
    """Its dropout is a number that no module and no field of the config is called after."""

    def __init__(self, config):
        super().__init__(config)
        self.model.norm.register_forward_hook(lambda module, _, x_BTC: F.dropout(x_BTC, 0.1, module.training))


class NamesNoEmbedding(HFGPTForCausalLM):
    def get_input_embeddings(self):
        raise NotImplementedError("it has none")


class TakesIdsOnly(HFGPTForCausalLM):
    """Its `forward` names embeddings, and its `generate` does not take them."""

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}


class MakesItsPositions(HFGPTForCausalLM):
    """It takes a cache and no positions, which it makes of the mask."""

    def forward(self, input_ids=None, attention_mask=None, cache=None, use_cache=None):
        return super().forward(input_ids, attention_mask, **{CACHE: cache}, use_cache=use_cache)


@pytest.fixture
def status_of():
    """A function that tries one promise with a class, and says what came of it."""

    def find(model_class, name):
        config = HFGPTConfig(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        (result,) = check(Subject(model_class.__name__, model_class, config), only=[name]).results
        return result.finding.status

    return find


@pytest.mark.parametrize(
    ("model_class", "name", "status"),
    [
        (DropsForCausalLM, "trainer-is-a-plain-loop", "pass"),
        (NamesNoEmbedding, "more-tokens-than-positions-are-refused-or-harmless", "pass"),
        (NamesNoEmbedding, "tied-weights-stay-tied", "n/a"),
        (NamesNoEmbedding, "embeddings-are-named", "fail"),
        (MakesItsPositions, "cached-steps-of-padded-rows-equal-uncached", "pass"),
        (TakesIdsOnly, "embeddings-may-take-the-place-of-ids", "n/a"),
    ],
)
def test_a_stranger_is_told_what_is_broken_and_nothing_else(status_of, model_class, name, status):
    assert status_of(model_class, name) == status


@pytest.mark.parametrize(("name", "is_one"), [("drop_rate", True), ("resid_pdrop", True), ("layerdrop", False)])
def test_a_dropout_is_found_under_the_names_that_people_give_it(name, is_one):
    config = HFGPTConfig()
    setattr(config, name, 0.1)

    assert (name in dropout_fields(config)) == is_one
