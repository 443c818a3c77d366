import pytest
import torch
import torch.nn.functional as F
from contract import (
    ALL_CLASSES,
    GPT2_CLASSES,
    SUM_ORDER,
    TOKEN_CLASSES,
    flex_mask_warning,
    flex_uncompiled_warning,
    pad,
    random_ids,
    scores,
)
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import hfgpt

pytestmark = [pytest.mark.usefixtures("uncompiled"), flex_mask_warning, flex_uncompiled_warning]

IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention", "a user's own"]
LENGTHS = [20, 13, 5]


def own_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """What a user might register: torch's own attention, without any of transformers' shortcuts."""
    is_causal = attention_mask is None and query.shape[2] > 1
    options = {"dropout_p": dropout, "scale": scaling, "is_causal": is_causal, "enable_gqa": True}
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, **options)
    return attended.transpose(1, 2), None


AttentionInterface.register("a user's own", own_attention)
AttentionMaskInterface.register("a user's own", sdpa_mask)
AttentionInterface.register("without a mask function", own_attention)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():  # flex_attention has no backward on a CPU
        yield


@pytest.fixture
def ids():
    return random_ids(3, 20)


@pytest.mark.parametrize("model_class", ALL_CLASSES)
@pytest.mark.parametrize("attention", IMPLEMENTATIONS[1:])
def test_every_attention_implementation_says_the_same(make, ids, model_class, attention):
    model = make(model_class, "eager", pad_token_id=0)
    expected = scores(model(ids))

    model.set_attn_implementation(attention)

    assert model.config._attn_implementation == attention
    torch.testing.assert_close(scores(model(ids)), expected, **SUM_ORDER)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("positions_given", [False, True], ids=["positions found", "positions given"])
@pytest.mark.parametrize("model_class", TOKEN_CLASSES)
def test_padding_changes_nothing(make, ids, model_class, attention, side, positions_given):
    model = make(model_class, attention)
    padded, mask = pad(ids, LENGTHS, side)
    positions = {"position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0)} if positions_given else {}

    together = scores(model(padded, attention_mask=mask, **positions))

    for row, length in enumerate(LENGTHS):
        alone = scores(model(ids[[row], :length]))[0]
        torch.testing.assert_close(together[row][mask[row] == 1], alone, **SUM_ORDER)


@pytest.mark.parametrize("model_class", TOKEN_CLASSES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_mask_of_one_place_per_query_and_key_is_taken_as_it_is(make, ids, model_class, attention):
    model = make(model_class, attention)
    can_see = torch.ones(20, 20, dtype=torch.bool).tril()
    can_see[12:, 3] = False
    mask = torch.where(can_see, 0.0, torch.finfo(torch.float32).min)[None, None].expand(3, 1, 20, 20)

    masked, changed = ids.clone(), ids.clone()
    changed[:, 3] = changed[:, 3] % 319 + 1
    before, after = (scores(model(each, attention_mask=mask)) for each in (masked, changed))

    # Only a one-layer model would be blind to token 3 from place 12 on: others still hear of it from places 4 to 11.
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:12], after[:, 3:12], atol=1e-2)
    plain = torch.where(torch.ones(20, 20, dtype=torch.bool).tril(), 0.0, torch.finfo(torch.float32).min)
    causal = scores(model(ids, attention_mask=plain[None, None].expand(3, 1, 20, 20)))
    torch.testing.assert_close(causal, scores(model(ids)), **SUM_ORDER)
    assert not torch.allclose(before[:, 12:], causal[:, 12:], atol=1e-4)


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_attentions_and_hidden_states_are_those_of_transformers(make_pair, ids, model_class):
    gpt2, model = make_pair(model_class, "eager")

    mine, theirs = (each(ids, output_attentions=True, output_hidden_states=True) for each in (model, gpt2))

    assert [each.shape for each in mine.attentions] == [(3, 4, 20, 20)] * 2
    assert [each.shape for each in mine.hidden_states] == [(3, 20, 32)] * 3
    torch.testing.assert_close(mine.attentions, theirs.attentions, **SUM_ORDER)
    torch.testing.assert_close(mine.hidden_states, theirs.hidden_states, **SUM_ORDER)


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_outputs_may_be_asked_for_as_tuples(make, ids, model_class):
    model = make(model_class, pad_token_id=0)

    as_tuple, as_output = model(ids, return_dict=False), model(ids)

    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], as_output.to_tuple()[0])


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_embeddings_may_be_given_in_place_of_ids(make, ids, model_class):
    model = make(model_class)
    embeddings = model.get_input_embeddings()(ids)

    assert torch.equal(scores(model(inputs_embeds=embeddings)), scores(model(ids)))
    for both_or_neither in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="Give `input_ids` or `inputs_embeds`, one of them"):
            model(**both_or_neither)


@pytest.mark.parametrize("model_class", TOKEN_CLASSES)
def test_positions_may_be_given(make_pair, ids, model_class):
    gpt2, model = make_pair(model_class)
    positions = torch.arange(20)[None] + torch.tensor([[0], [7], [44]])

    mine, theirs = (scores(each(ids, position_ids=positions)) for each in (model, gpt2))

    torch.testing.assert_close(mine, theirs, **SUM_ORDER)
    is_same_when_shifted = torch.allclose(mine[1:], scores(model(ids))[1:], atol=1e-2)
    assert is_same_when_shifted == (model_class not in GPT2_CLASSES)  # rotations know distances, not places
    assert torch.equal(mine[:1], scores(model(ids[:1], position_ids=torch.arange(20)[None])))


def test_a_position_that_does_not_exist_is_a_clear_error(make, ids):
    model = make(hfgpt.HFGPTForCausalLM)

    with pytest.raises(ValueError, match=r"has 65 tokens, the model `max_position_embeddings` \(64\)"):
        model(ids, position_ids=torch.arange(45, 65)[None])


def test_padding_is_refused_by_an_attention_that_would_not_see_it(make, ids):
    model = make(hfgpt.HFGPTForCausalLM, "without a mask function")
    padded, mask = pad(ids, LENGTHS, "left")

    torch.testing.assert_close(
        model(ids, attention_mask=torch.ones_like(ids)).logits,
        make(hfgpt.HFGPTForCausalLM, "sdpa")(ids).logits,
        **SUM_ORDER,
    )
    with pytest.raises(ValueError, match="'without a mask function' has no mask function"):
        model(padded, attention_mask=mask)
