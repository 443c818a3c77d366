"""Tools that hold a model by its conventions: each does with hfgpt what it does with GPT-2."""

import pytest
import torch
from contract import ALL_CLASSES, SUM_ORDER, pad, random_ids

import hfgpt

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    # torch.jit reads every property of a module, transformers' old ones too.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # of lengths that are the same in every trace
]


@pytest.fixture
def ids():
    return random_ids(2, 10)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_a_trace_of_torch_jit_is_the_model_at_any_length(make, ids, model_class, attention):
    model = make(model_class, attention, use_cache=False, pad_token_id=0)
    traced = torch.jit.trace(model, ids, strict=False)

    for other in (random_ids(2, 17, seed=1), random_ids(3, 5, seed=2), random_ids(1, 64, seed=3), random_ids(1, 1)):
        expected = model(other, return_dict=False)[0]
        torch.testing.assert_close(next(iter(traced(other).values())), expected, **SUM_ORDER)
    with pytest.raises(RuntimeError, match="index out of range"):
        traced(random_ids(1, 65))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_trace_of_torch_jit_sees_the_padding_of_other_inputs(make, ids, attention, side):
    model = make(hfgpt.HFGPTForCausalLM, attention, use_cache=False)
    padded, mask = pad(ids, [10, 6], side)
    traced = torch.jit.trace(model, example_kwarg_inputs={"input_ids": padded, "attention_mask": mask}, strict=False)
    others, their_mask = pad(random_ids(3, 20, seed=1), [20, 13, 5], side)

    logits = traced(input_ids=others, attention_mask=their_mask)["logits"]

    expected = model(others, attention_mask=their_mask).logits
    torch.testing.assert_close(logits[their_mask == 1], expected[their_mask == 1], **SUM_ORDER)
