"""Beam search finds what transformers' finds, and with enough beams the best text of all."""

from copy import deepcopy
from itertools import product

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hfgpt.generation.beam_search import beam_search
from hfgpt.generation.decoding import generate
from hfgpt.generation.params import OPTIONS, SamplingParams

LEFT_PADDING = (torch.arange(7) >= torch.tensor([[0], [2], [5]])).long()
EOS = [42, 34, 45]
"""Tokens that the model likes in many places."""


@pytest.fixture(scope="module")
def model(model):
    """The model of these tests, much less sure of itself: then beams part ways, and end at different lengths."""
    model = deepcopy(model)
    model.lm_head.weight.data.mul_(0.12)
    return model


def search(model, prompts, **settings):
    """`beam_search` with the params among `settings`."""
    params = {name: value for name, value in settings.items() if name in OPTIONS}
    inputs = {name: value for name, value in settings.items() if name not in OPTIONS}
    return beam_search(model, prompts, SamplingParams(**params), **inputs)


def search_with_transformers(model, prompts, mask, num_beams, **settings):
    """The beams that `generate` finds, as lists of ids without the filling up, and their scores."""
    mask = torch.ones_like(prompts) if mask is None else mask
    output = model.generate(
        prompts,
        attention_mask=mask,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
        pad_token_id=60,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    new = output.sequences[:, prompts.shape[1] :].tolist()
    return new, output.sequences_scores.tolist()


def assert_equal_beams(found, expected):
    beams = [beam for row in found for beam in row]
    for beam, ids, score in zip(beams, *expected, strict=True):
        assert ids[: len(beam.ids)] == beam.ids
        assert set(ids[len(beam.ids) :]) <= {60}
        assert beam.score == pytest.approx(score, rel=1e-5)  # sums of up to 20 log-probabilities in fp32


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("mask", [None, LEFT_PADDING], ids=["full", "left-padded"])
def test_all_beams_and_scores_are_those_of_transformers_generate(model, prompts, mask, length_penalty, early_stopping):
    how = {"length_penalty": length_penalty, "early_stopping": early_stopping, "max_new_tokens": 15}

    found = search(model, prompts, attention_mask=mask, num_beams=4, eos_token_id=EOS, **how)

    assert_equal_beams(found, search_with_transformers(model, prompts, mask, 4, eos_token_id=EOS, **how))


def test_the_way_to_stop_and_the_length_penalty_change_what_is_found(model, prompts):
    def texts(length_penalty, early_stopping):
        how = {"length_penalty": length_penalty, "early_stopping": early_stopping, "max_new_tokens": 15}
        return str([[beam.ids for beam in row] for row in search(model, prompts, num_beams=4, eos_token_id=EOS, **how)])

    # Or the test above would say little.
    assert len({texts(2.0, early_stopping) for early_stopping in (False, True, "never")}) == 3
    assert len({texts(length_penalty, "never") for length_penalty in (-1.0, 0.0, 1.0, 2.0)}) >= 3


@pytest.mark.parametrize(
    "rules",
    [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3}],
    ids=str,
)
def test_rules_about_earlier_tokens_hold_in_every_beam(model, prompts, rules):
    found = search(model, prompts, num_beams=3, max_new_tokens=20, **rules)

    assert_equal_beams(found, search_with_transformers(model, prompts, None, 3, max_new_tokens=20, **rules))
    assert found != search(model, prompts, num_beams=3, max_new_tokens=20)


def test_ids_that_no_tokenizer_knows_are_in_no_beam(model, prompts):
    unknown = sorted({token for row in search(model, prompts, num_beams=3, max_new_tokens=15) for token in row[0].ids})
    suppress_mask = torch.zeros(61, dtype=torch.bool).index_fill(0, torch.tensor(unknown), True)

    found = search(model, prompts, num_beams=3, max_new_tokens=15, suppress_mask=suppress_mask)

    expected = search_with_transformers(model, prompts, None, 3, max_new_tokens=15, suppress_tokens=unknown)
    assert_equal_beams(found, expected)


def test_a_row_finds_the_same_alone_and_beside_others(model, prompts):
    together = search(
        model,
        prompts,
        attention_mask=LEFT_PADDING,
        num_beams=3,
        max_new_tokens=15,
        eos_token_id=EOS,
        early_stopping=True,
    )

    for row, padding in enumerate([0, 2, 5]):
        (alone,) = search(
            model,
            prompts[row : row + 1, padding:],
            num_beams=3,
            max_new_tokens=15,
            eos_token_id=EOS,
            early_stopping=True,
        )
        assert [beam.ids for beam in alone] == [beam.ids for beam in together[row]]


def test_one_beam_is_greedy(model, prompts):
    found = search(model, prompts, num_beams=1, max_new_tokens=30)

    greedy = generate(model, prompts, SamplingParams(max_new_tokens=30, temperature=0))[:, 7:]
    assert [row[0].ids for row in found] == greedy.tolist()


@pytest.fixture(scope="module")
def tiny_model():
    """A model of five tokens, of whose texts all can be counted up."""
    config = GPT2Config(
        vocab_size=5, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.7)
    return model


@torch.no_grad()
def best_texts(model, prompt, length, eos, length_penalty):
    """Every text that ends with `eos` or has `length` tokens, with its score, the best first."""
    scored = []
    for ids in product(range(5), repeat=length):
        text = ids[: ids.index(eos) + 1] if eos in ids else ids
        logits = model(torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1].double()
        total = float(logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None]).sum())
        scored.append((total / len(text) ** length_penalty, text))
    return sorted(set(scored), reverse=True)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_with_enough_beams_the_search_is_exhaustive(tiny_model, length_penalty):
    found = search(
        tiny_model,
        torch.tensor([[1, 3, 0], [2, 2, 4]]),
        num_beams=125,
        max_new_tokens=3,
        eos_token_id=2,
        length_penalty=length_penalty,
        early_stopping="never",
    )

    for row, prompt in zip(found, [(1, 3, 0), (2, 2, 4)], strict=True):
        expected = best_texts(tiny_model, prompt, 3, 2, length_penalty)
        assert len(row) == len(expected) == 85  # 1 + 4 + 4 * 4 * 5
        assert [beam.score for beam in row] == pytest.approx([score for score, _ in expected], rel=1e-5)
        assert [tuple(beam.ids) for beam in row[:5]] == [text for _, text in expected[:5]]


def test_a_text_ends_where_it_is_told_to(model, prompts):
    def is_stopped(ids):
        return sum(ids) % 7 == 3

    found = search(model, prompts, num_beams=4, max_new_tokens=12, is_stopped=is_stopped)

    for beam in (beam for row in found for beam in row):
        assert is_stopped(beam.ids) or len(beam.ids) == 12
        assert not any(is_stopped(beam.ids[:length]) for length in range(1, len(beam.ids)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "`num_beams` must be at least 1, got 0"),
        ({"length_penalty": float("nan")}, "`length_penalty` must be finite, got nan"),
        ({"early_stopping": "always"}, r"`early_stopping` must be one of \[False, True, 'never'\], got 'always'"),
        ({"max_new_tokens": 42}, r"\(7 tokens\).*\(42\).*\(48\). Shorten the prompt"),
        ({"max_new_tokens": 41, "no_repeat_ngram_size": 1, "few": True}, "leaves no token to go on with"),
    ],
)
def test_what_cannot_be_searched_is_refused(model, prompts, settings, message):
    if settings.pop("few", False):
        settings["suppress_mask"] = torch.arange(61) >= 12

    with pytest.raises(ValueError, match=message):
        search(model, prompts % 12, **{"num_beams": 2, "max_new_tokens": 5, **settings})
