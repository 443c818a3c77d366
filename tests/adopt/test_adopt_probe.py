import pytest
import torch
from torch import nn

from hfgpt.adopt.probe import constant_buffers, probe


@pytest.mark.parametrize(
    ("kind", "arguments", "limit", "vocab_size"),
    [
        ("constants of a script", {}, 16, 40),
        ("a dataclass", {"targets": "ids"}, 64, 320),
        ("a dictionary", {}, 16, 61),
        ("a mask, time first", {"src_mask": "true where hidden"}, 24, 61),
        ("keywords, in a package", {}, 32, 61),
        ("an object within an object", {}, 12, 61),
    ],
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
def test_how_a_module_is_called_and_how_long_a_text_it_takes_is_found(take_out, kind, arguments, limit, vocab_size):
    taken, constructor, _ = take_out(kind)

    found = probe(constructor.build(taken), constructor.values)

    assert found.call.arguments == arguments
    assert found.call.time_first == ("time first" in kind)
    assert (found.limit, found.vocab_size) == (limit, vocab_size)


def test_every_kind_of_constructor_gets_what_its_config_says(take_out):
    taken, constructor, _ = take_out("a dataclass")

    module = constructor.build(taken)

    assert len(module.h) == 2
    assert module.config.betas == (0.9, 0.99)  # YAML has no tuples
    assert constructor.values["block_size"] == 64  # a default of the dataclass is kept, too


def test_a_misspelt_argument_is_refused_with_the_nearest_one(take_out):
    with pytest.raises(ValueError, match=r"takes no 'depht'\. Did you mean `?depth"):
        take_out("keywords, in a package", depht=3)


def test_a_field_that_the_annotated_config_lacks_is_refused_with_the_nearest_one(take_out):
    with pytest.raises(ValueError, match=r"ModelConfig has no 'n_layers'\. Did you mean `?n_layer"):
        take_out("a dataclass", "Annotated", n_layers=3)


@pytest.mark.parametrize(("name", "message"), [("Probabilities", "probabilities"), ("Both", "cannot be used")])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
def test_what_is_no_causal_language_model_is_refused(take_out, name, message):
    taken, constructor, _ = take_out("a mask, time first", name)

    with pytest.raises(ValueError, match=message):
        probe(constructor.build(taken), constructor.values)


def test_a_mask_that_sees_the_future_is_refused():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(20, 8)

        def forward(self, idx):
            x = self.emb(idx)
            return (x + x.mean(1, keepdim=True)) @ self.emb.weight.t()

    with pytest.raises(ValueError, match="its attention is not causal"):
        probe(Bag(), {})


def test_only_buffers_that_are_always_the_same_are_left_to_the_constructor():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(3, 3).tril())
            self.register_buffer("drawn", torch.randn(3))

    first, second = Counts(), Counts()

    assert constant_buffers(first, second, first.state_dict()) == ["mask"]
