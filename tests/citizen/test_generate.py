"""`model.generate` and what belongs to it; the oracle is transformers' GPT-2 with the same weights."""

import re

import pytest
import torch
from contract import SUM_ORDER, cache_of, draw_parameters, pad, random_ids
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    TextIteratorStreamer,
)

import hfgpt

NEW_TOKENS = 24


def enliven(model):
    """Let the embeddings outweigh the blocks, so that the greedy text is not one token over and over."""
    with torch.no_grad():
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            embeddings.weight.mul_(10)
    return model


def is_lively(texts):
    return all(len(set(row[20:].tolist())) > 5 for row in texts)


def compile_anywhere(**settings):
    """A CompileConfig that holds on a CPU too, where transformers leaves a static cache's steps uncompiled."""
    config = CompileConfig(fullgraph=True, **settings)
    config._compile_all_devices = True
    return config


@pytest.fixture
def ids():
    return random_ids(3, 20)


@pytest.fixture
def pair(make_pair):
    """GPT-2 and hfgpt with the same weights, whose texts do not repeat one token."""
    return [enliven(each) for each in make_pair(hfgpt.HFGPTForCausalLM, tie_word_embeddings=False)]


def write(model, ids, **how):
    torch.manual_seed(0)
    return model.generate(ids, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, **how})


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True},
        {"num_beams": 3, "do_sample": True, "top_k": 10},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
        {"do_sample": True, "min_p": 0.05, "typical_p": 0.9},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 8, "eos_token_id": [5, 7, 9], "bad_words_ids": [[11, 12]], "suppress_tokens": [13]},
    ],
    ids=lambda how: " ".join(how) or "greedy",
)
def test_generate_writes_what_gpt2_writes(pair, ids, padded, how):
    prompts, mask = pad(ids, [20, 13, 5] if padded else [20, 20, 20], "left")

    theirs, mine = (write(model, prompts, attention_mask=mask, **how) for model in pair)

    assert torch.equal(mine, theirs)
    assert is_lively(mine)


def test_scores_and_attentions_of_generated_tokens_are_gpt2s(pair, ids):
    for model in pair:
        model.set_attn_implementation("eager")
    asked = {"output_scores": True, "output_logits": True, "output_attentions": True, "output_hidden_states": True}

    theirs, mine = (write(model, ids, return_dict_in_generate=True, **asked) for model in pair)

    assert len(mine.scores) == len(mine.attentions) == NEW_TOKENS
    for name in ("scores", "logits", "attentions", "hidden_states"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-5, atol=1e-4)


def test_a_draft_model_changes_the_speed_and_not_the_text(pair, ids, tiny):
    _, model = pair
    config = hfgpt.HFGPTConfig(**{**tiny, "num_hidden_layers": 1, "tie_word_embeddings": False})
    draft = enliven(hfgpt.HFGPTForCausalLM(config).eval())
    draw_parameters(draft)
    draft.load_state_dict({name: model.state_dict()[name] for name in draft.state_dict()})  # its first block alone
    draft.generation_config.num_assistant_tokens = 4
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))

    for row in ids:
        alone, steps = write(model, row[None]), len(calls)
        assisted = write(model, row[None], assistant_model=draft)
        assert torch.equal(assisted, alone)
        assert len(calls) - steps <= steps
        calls.clear()


def test_continuous_batching_writes_the_same_texts(pair, ids):
    _, model = pair
    prompts = [ids[0].tolist(), ids[1, :13].tolist(), ids[2, :5].tolist()]
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)

    space = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=128)  # not most of the machine's memory

    results = model.generate_batch(prompts, generation_config=config, continuous_batching_config=space)

    texts = [results[name].generated_tokens for name in sorted(results, key=lambda name: int(name.split("_")[-1]))]
    for prompt, text in zip(prompts, texts, strict=True):
        assert text == write(model, torch.tensor([prompt]))[0, len(prompt) :].tolist()


def test_a_function_of_the_users_own_may_generate(pair, ids):
    _, model = pair

    def greedy(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        while not stopping_criteria(input_ids, None).all():
            next_ids = model(input_ids).logits[:, -1].argmax(dim=-1, keepdim=True)
            input_ids = torch.cat([input_ids, next_ids], dim=1)
        return input_ids

    assert torch.equal(write(model, ids, custom_generate=greedy), write(model, ids))


def test_a_logits_processor_of_the_users_own_is_asked(pair, ids):
    class OddOnly(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, ::2] = -torch.inf
            return scores

    text = write(pair[1], ids, logits_processor=LogitsProcessorList([OddOnly()]))

    assert (text[:, 20:] % 2 == 1).all()


def test_text_streams_and_stops_at_a_string(pair, tokenizer, lines):
    _, model = pair
    prompt = tokenizer(lines[0][:30], return_tensors="pt")["input_ids"]
    whole = tokenizer.decode(write(model, prompt)[0, prompt.shape[1] :])
    stop = re.search("[a-z|]{3}", whole).group()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)

    stopped = write(model, prompt, stop_strings=[stop], tokenizer=tokenizer, streamer=streamer)

    text = tokenizer.decode(stopped[0, prompt.shape[1] :])
    assert "".join(streamer) == text
    assert stop in text
    assert whole.startswith(text)
    assert len(text) < len(whole)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("lengths", [[20, 20, 20], [20, 13, 5]], ids=["full", "left-padded"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_cached_step_equals_the_full_pass(make, ids, attention, lengths, static):
    model = make(hfgpt.HFGPTForCausalLM, attention)
    padded, mask = pad(ids, lengths, "left")
    one_pass = model(padded, attention_mask=mask).logits

    cache, steps = StaticCache(config=model.config, max_cache_len=32) if static else None, []
    for start, end in [(0, 7), (7, 9), *((place, place + 1) for place in range(9, 20))]:
        output = model(padded[:, start:end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
        cache = cache_of(output)
        steps.append(output.logits)

    assert int(cache.get_seq_length()) == 20
    torch.testing.assert_close(torch.cat(steps, dim=1)[mask == 1], one_pass[mask == 1], **SUM_ORDER)


def test_steps_with_a_static_cache_are_one_graph(pair, ids):
    _, model = pair

    # This backend runs the captured graph as it is: a graph break is an error, and no C++ compiler is needed.
    compiled = write(
        model, ids, cache_implementation="static", compile_config=compile_anywhere(backend="eager", mode=None)
    )

    assert torch.equal(compiled, write(model, ids))


@pytest.mark.slow
def test_compiled_steps_with_a_static_cache_write_the_same_text(pair, ids):
    _, model = pair

    compiled = write(model, ids, cache_implementation="static", compile_config=compile_anywhere(mode=None))

    assert torch.equal(compiled, write(model, ids))


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}])
def test_generating_past_the_last_position_is_a_clear_error(pair, how):
    _, model = pair
    prompts = random_ids(2, 60)

    assert write(model, prompts, max_new_tokens=4, **how).shape == (2, 64)
    with pytest.raises(ValueError, match=r"65 tokens, the model `max_position_embeddings` \(64\)"):
        write(model, prompts, max_new_tokens=6, **how)


def test_compiled_steps_past_the_last_position_are_a_clear_error(pair):
    settings = {"cache_implementation": "static", "compile_config": compile_anywhere(backend="eager", mode=None)}

    with pytest.raises(RuntimeError, match=r"the sequence is longer than `max_position_embeddings` \(64\)"):
        write(pair[1], random_ids(2, 60), max_new_tokens=6, **settings)


def test_padding_takes_no_positions(pair):
    _, model = pair
    prompts, mask = pad(random_ids(1, 70), [20], "left")

    text = write(model, prompts, attention_mask=mask)

    assert torch.equal(text[:, 70:], write(model, prompts[:, 50:])[:, 20:])
