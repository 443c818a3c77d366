"""The cache is `past_key_values` in transformers 5.23 and `cache` from 5.24 on: models take both and give the one."""

import inspect
import logging
import warnings

import pytest
import torch
from accelerate import dispatch_model
from contract import ALL_CLASSES, SUM_ORDER, cache_of, draw_parameters, pad, random_ids, scores
from transformers import CompileConfig, DynamicCache, StaticCache, Trainer, TrainingArguments

import hfgpt
from hfgpt.arguments import CACHE

NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
NAMES = ["past_key_values", "cache"]


@pytest.fixture
def ids():
    return random_ids(3, 20)


@pytest.fixture
def model(make):
    """A language model whose greedy text is not one token over and over."""
    model = make(hfgpt.HFGPTForCausalLM, tie_word_embeddings=False)
    with torch.no_grad():
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            embeddings.weight.mul_(10)
    return model


def write(model, ids, **how):
    return model.generate(ids, **{"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **how})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_a_cache_is_taken_under_either_name(make, ids, model_class, name):
    model = make(model_class)
    cache = DynamicCache()
    model(ids[:, :9], **{name: cache})
    assert cache.get_seq_length() == 9

    rest = scores(model(ids[:, 9:], **{name: cache}))

    whole = scores(model(ids))
    torch.testing.assert_close(rest, whole if rest.ndim == 2 else whole[:, 9:], **SUM_ORDER)


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_two_caches_are_refused(make, ids, model_class):
    with pytest.raises(ValueError, match="`past_key_values` and `cache` are two names of one argument"):
        make(model_class)(ids, past_key_values=DynamicCache(), cache=DynamicCache())


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_tools_that_look_for_a_name_in_the_signature_find_it(model_class):
    parameters = inspect.signature(model_class.forward).parameters
    assert {"input_ids", "attention_mask", "position_ids", "inputs_embeds", *NAMES} <= set(parameters)


def test_the_cached_text_is_the_uncached_one(model, ids):
    text = write(model, ids, use_cache=False)

    assert len(set(text[0, 20:].tolist())) > 5
    assert torch.equal(write(model, ids), text)
    assert torch.equal(write(model, ids, cache_implementation="static"), text)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 5},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=True, backend="eager", mode=None)},
        {"prompt_lookup_num_tokens": 3},
        {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
    ],
    ids=["greedy", "uncached", "beams", "sampled", "static", "compiled", "assisted", "recorded"],
)
def test_nothing_is_said_of_names_that_are_deprecated(model, ids, how, caplog):
    for logger in (logging.getLogger("transformers"), *map(logging.getLogger, logging.root.manager.loggerDict)):
        once = getattr(type(logger), "warning_once", None)
        if hasattr(once, "cache_clear"):
            once.cache_clear()
    if "compile_config" in how:
        how["compile_config"]._compile_all_devices = True
    model.set_attn_implementation("eager")

    rows = 1 if "prompt_lookup_num_tokens" in how else 3
    prompts, mask = pad(ids, [20, 13, 5], "left")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(model, prompts[:rows], attention_mask=mask[:rows], **how)
        model.train()(ids, labels=ids, use_cache=True).loss.backward()

    assert [record.getMessage() for record in caplog.records if "deprecated" in record.getMessage()] == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_cache_given_to_a_checkpointed_step_is_not_filled_twice(make, ids, reentrant):
    model = make(hfgpt.HFGPTForCausalLM, **NO_DROPOUT).train()
    loss = model(ids, labels=ids).loss
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    cache = DynamicCache()

    again = model(ids, labels=ids, **{CACHE: cache})
    again.loss.backward()

    assert torch.equal(again.loss, loss)
    assert cache.get_seq_length() == 0
    assert cache_of(again) is None


def test_a_filled_cache_is_refused_by_a_checkpointed_step(make, ids):
    model = make(hfgpt.HFGPTForCausalLM, **NO_DROPOUT).train()
    with torch.no_grad():
        cache = cache_of(model(ids[:, :9], use_cache=True))
    model.activation_checkpointing_enable()

    with pytest.raises(ValueError, match="a cache that holds tokens cannot be read while activations are checkpointed"):
        model(ids[:, 9:], **{CACHE: cache})
    with torch.no_grad():  # nothing is computed twice without gradients
        rest = model(ids[:, 9:], **{CACHE: cache}).logits
    torch.testing.assert_close(rest, model.eval()(ids).logits[:, 9:], **SUM_ORDER)


def test_trainer_predicts_scores_and_no_cache(make, tmp_path):
    model = make(hfgpt.HFGPTForCausalLM)
    rows = [{"input_ids": row, "labels": row} for row in random_ids(5, 20)]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, use_cache=True)

    predictions = Trainer(model, arguments).predict(rows).predictions

    expected = torch.cat([model(row["input_ids"][None]).logits for row in rows]).detach()
    torch.testing.assert_close(torch.tensor(predictions), expected, **SUM_ORDER)


def test_a_model_with_a_device_map_hands_its_cache_from_block_to_block(model, ids):
    text = write(model, ids)

    spread = dispatch_model(model, {"": "cpu"}, force_hooks=True)

    assert hasattr(spread.model.layers[0], "_hf_hook")
    assert torch.equal(write(spread, ids), text)
    cache = StaticCache(config=model.config, max_cache_len=64)
    assert cache_of(spread(ids, **{CACHE: cache})) is cache


def test_a_draft_model_shares_no_cache_with_its_model(model, ids, make):
    draft = make(hfgpt.HFGPTForCausalLM, num_hidden_layers=1)
    draw_parameters(draft)

    assert torch.equal(write(model, ids[:1], assistant_model=draft), write(model, ids[:1]))
