"""What a forward pass is given is used, handed on, or refused; the oracle for what is used is transformers' GPT-2."""

import pytest
import torch
from contract import ALL_CLASSES, GPT2_CLASSES, SUM_ORDER, random_ids, scores
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import hfgpt


@pytest.fixture
def ids():
    return random_ids(3, 20)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("model_class", ALL_CLASSES)
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("atention_mask", "attention_mask"),
        ("past_key_value", "past_key_values"),
        ("position_id", "position_ids"),
        ("input_embeds", "inputs_embeds"),
        ("lables", "labels"),
        ("num_item_in_batch", "num_items_in_batch"),
        ("output_attention", "output_attentions"),
    ],
)
def test_a_misspelt_argument_is_refused_with_the_nearest_name(make, ids, model_class, attention, name, meant):
    model = make(model_class, attention)

    with pytest.raises(TypeError, match=rf"nothing reads, `{name}`\. Did you mean `{meant}`\?"):
        model(ids, **{name: torch.ones_like(ids)})


@pytest.mark.parametrize("name", ["encoder_hidden_states", "encoder_attention_mask", "head_mask", "softcap"])
def test_what_would_change_another_models_logits_is_refused(make, ids, name):
    with pytest.raises(TypeError, match=f"nothing reads, `{name}`"):
        make(hfgpt.HFGPTForCausalLM)(ids, **{name: torch.ones(3, 20, 32)})


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_an_argument_that_is_none_is_no_argument(make, ids, model_class):
    model = make(model_class)

    assert torch.equal(scores(model(ids, encoder_hidden_states=None, head_mask=None)), scores(model(ids)))


def test_return_dict_is_understood(make, ids):
    model = make(hfgpt.HFGPTForCausalLM)

    assert torch.equal(model(ids, return_dict=False)[0], model(ids, return_dict=True).logits)


def test_an_attention_function_of_the_users_own_gets_every_argument(make, ids):
    seen = {}

    def own(*args, attention_instances=None, **kwargs):
        seen.update(attention_instances=attention_instances, **kwargs)
        return sdpa_attention_forward(*args, **{name: kwargs[name] for name in ("dropout", "scaling")})

    AttentionInterface.register("with instances", own)
    AttentionMaskInterface.register("with instances", sdpa_mask)
    model = make(hfgpt.HFGPTForCausalLM, "with instances")

    logits = model(ids, attention_instances={0: "a", 1: "b"}, other=3).logits

    assert seen["attention_instances"] == {0: "a", 1: "b"}
    assert seen["other"] == 3
    torch.testing.assert_close(logits, make(hfgpt.HFGPTForCausalLM)(ids).logits, **SUM_ORDER)


def test_an_argument_that_the_attention_function_names_reaches_it(make, ids):
    model = make(hfgpt.HFGPTForCausalLM, "sdpa")
    away_from_itself = torch.zeros(1, 1, 20, 20).masked_fill(torch.eye(20, dtype=torch.bool), -5)

    assert not torch.allclose(model(ids, position_bias=away_from_itself).logits, model(ids).logits, atol=1e-2)
    with pytest.raises(TypeError, match="`position_bias`"):
        make(hfgpt.HFGPTForCausalLM, "eager")(ids, position_bias=away_from_itself)


@pytest.mark.parametrize("model_class", GPT2_CLASSES)
def test_token_type_ids_are_embedded_and_added_as_in_gpt2(make_pair, ids, model_class):
    gpt2, model = make_pair(model_class)
    types = random_ids(3, 20, seed=1)

    mine, theirs = (scores(each(ids, token_type_ids=types)) for each in (model, gpt2))

    torch.testing.assert_close(mine, theirs, **SUM_ORDER)
    assert not torch.allclose(mine, scores(model(ids)), atol=1e-2)


def test_text_with_token_type_ids_is_that_of_gpt2(make_pair, ids):
    gpt2, model = make_pair(hfgpt.HFGPTForCausalLM, tie_word_embeddings=False)
    with torch.no_grad():
        for each in (gpt2, model):
            each.get_input_embeddings().weight.mul_(10)
    types = random_ids(3, 20, seed=1)

    mine, theirs = (
        each.generate(ids, token_type_ids=types, max_new_tokens=24, do_sample=False, pad_token_id=0)
        for each in (model, gpt2)
    )

    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0))


def test_the_loss_leaves_out_another_id_if_it_is_told_to(make_pair, ids):
    gpt2, model = make_pair(hfgpt.HFGPTForCausalLM)
    labels = ids.masked_fill(ids < 80, 319)
    gpt2.loss_type = "ForCausalLM"

    expected = gpt2(ids, labels=labels, ignore_index=319).loss

    torch.testing.assert_close(model(ids, labels=labels, ignore_index=319).loss, expected)
    torch.testing.assert_close(model(ids, labels=labels, ignore_index=319, skip_logits=True).loss, expected)
    assert abs(model(ids, labels=labels).loss - expected) > 1e-2


def test_our_tokenizers_give_no_token_type_ids(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)

    assert set(AutoTokenizer.from_pretrained(tmp_path)("The file object")) == {"input_ids", "attention_mask"}
