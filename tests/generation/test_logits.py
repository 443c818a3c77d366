"""The rules of decoding, each against transformers' and against its paper's definition, by brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import (
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hfgpt.generation.logits import (
    apply_temperature,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    forbid_repeated_ngrams,
    penalize_repetition,
)

# The logits of the nine-word example in Raschka, "Build a Large Language Model (From Scratch)", section 5.3.
NINE_WORDS = torch.tensor([[4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])
RANDOM_LOGITS = torch.randn(50, 100, generator=torch.Generator().manual_seed(0)) * 4
EARLIER = torch.randint(6, (50, 30), generator=torch.Generator().manual_seed(1))  # so few that many n-grams come twice


@pytest.mark.parametrize("logits", [RANDOM_LOGITS, RANDOM_LOGITS.round()], ids=["distinct", "tied"])
@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (apply_temperature, TemperatureLogitsWarper, [0.1, 0.7, 1.0, 2.5]),
        (filter_top_k, TopKLogitsWarper, [1, 3, 50, 100, 1000]),
        (filter_top_p, TopPLogitsWarper, [1e-6, 0.1, 0.5, 0.9, 0.999]),
        (filter_min_p, MinPLogitsWarper, [1e-6, 0.02, 0.1, 0.5, 1.0]),
    ],
)
def test_logits_become_what_transformers_makes_of_them(ours, theirs, values, logits):
    before = logits.clone()
    for value in values:
        torch.testing.assert_close(ours(logits, value), theirs(value)(None, logits), rtol=0, atol=0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("logits", [RANDOM_LOGITS, RANDOM_LOGITS.round()], ids=["distinct", "tied"])
@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (penalize_repetition, RepetitionPenaltyLogitsProcessor, [0.5, 1.0, 1.3, 5.0]),
        (forbid_repeated_ngrams, NoRepeatNGramLogitsProcessor, [1, 2, 3, 31]),
    ],
)
def test_logits_after_earlier_tokens_become_what_transformers_makes_of_them(ours, theirs, values, logits):
    before, ids = logits.clone(), EARLIER.clone()
    for value in values:
        for length in (1, 2, 30):
            expected = theirs(value)(ids[:, :length], logits)
            torch.testing.assert_close(ours(logits, ids[:, :length], value), expected, rtol=0, atol=0)
    assert torch.equal(logits, before)
    assert torch.equal(ids, EARLIER)


@settings(derandomize=True, deadline=None)
@given(logits=st.lists(st.integers(-40, 40), min_size=1, max_size=20), top_p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_that_reaches_it(logits, top_p):
    logits = torch.tensor([logits], dtype=torch.float64) / 8

    kept = filter_top_p(logits, top_p) > -math.inf

    probabilities = logits.softmax(-1)
    assert probabilities[kept].sum() >= top_p - 1e-12  # sums of at most 20 float64 numbers below 1
    assert kept.sum() == 1 or probabilities[kept].sum() - probabilities[kept].min() < top_p + 1e-12
    assert kept.all() or probabilities[kept].min() >= probabilities[~kept].max()


def test_top_k_of_three_keeps_the_three_likeliest_of_nine_words():
    filtered = filter_top_k(NINE_WORDS, 3)

    assert filtered[filtered > -math.inf].tolist() == pytest.approx([4.51, 6.75, 6.28])


def test_the_defaults_change_nothing():
    logits = torch.tensor([[0.0, -200.0, 3.0]])  # the second has probability 0 in fp32

    assert torch.equal(filter_top_k(logits, 0), logits)
    assert torch.equal(filter_top_p(logits, 1.0), logits)
    assert torch.equal(filter_min_p(logits, 0.0), logits)
    assert torch.equal(penalize_repetition(logits, torch.tensor([[0, 1]]), 1.0), logits)
    assert torch.equal(forbid_repeated_ngrams(logits, torch.tensor([[0, 0]]), 0), logits)


def test_the_likeliest_token_always_stays():
    filtered = filter_min_p(filter_top_p(filter_top_k(apply_temperature(RANDOM_LOGITS, 3.0), 1), 1e-9), 1.0)

    assert torch.equal(filtered.isfinite().nonzero()[:, 1], RANDOM_LOGITS.argmax(-1))


@settings(derandomize=True, deadline=None)
@given(logits=st.lists(st.integers(-40, 40), min_size=1, max_size=20), min_p=st.floats(0, 1))
def test_min_p_keeps_what_the_paper_says(logits, min_p):
    logits = torch.tensor([logits], dtype=torch.float64) / 8

    kept = (filter_min_p(logits, min_p) > -math.inf)[0].tolist()

    weights = [math.exp(logit) for logit in logits[0].tolist()]
    for weight, is_kept in zip(weights, kept, strict=True):
        if not math.isclose(weight, min_p * max(weights), rel_tol=1e-12):  # where rounding decides
            assert is_kept == (weight / sum(weights) >= min_p * max(weights) / sum(weights))


def test_the_repetition_penalty_is_the_papers_for_positive_logits_and_never_makes_a_token_likelier():
    ids = torch.tensor([[3, 0, 3, 2]])

    penalized = penalize_repetition(NINE_WORDS, ids, 1.2)

    # Section 4.1: x_i / (T * I), where I is the penalty if the token is in the list, and 1 otherwise.
    expected = [4.51 / 1.2, 0.89, -1.90 * 1.2, 6.75 / 1.2, 1.63, -1.62, -1.89, 6.28, 1.79]
    assert penalized[0].tolist() == pytest.approx(expected)
    assert (penalized <= NINE_WORDS).all()


@settings(derandomize=True, deadline=None)
@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=12), size=st.integers(1, 4), padding=st.integers(0, 3))
def test_a_token_is_forbidden_just_if_its_ngram_came_before(ids, size, padding):
    padded = torch.tensor([[0] * padding + ids])
    mask = torch.tensor([[0] * padding + [1] * len(ids)])

    forbidden = forbid_repeated_ngrams(torch.zeros(1, 4), padded, size, mask)[0] == -math.inf

    ngrams = {tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)}
    for token in range(4):
        would_complete = len(ids) >= size - 1 and tuple([*ids, token][len(ids) + 1 - size :]) in ngrams
        assert forbidden[token] == would_complete


def test_padding_is_no_earlier_token():
    ids = torch.tensor([[0, 0, 2, 3], [0, 1, 2, 3]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])

    penalized = penalize_repetition(torch.ones(2, 5), ids, 2.0, mask)

    assert penalized.tolist() == [[1, 1, 0.5, 0.5, 1], [0.5, 0.5, 0.5, 0.5, 1]]


@pytest.mark.parametrize(
    ("function", "value"),
    [(apply_temperature, 0), (apply_temperature, -1), (filter_top_k, -2), (filter_top_p, -1), (filter_min_p, 2)],
)
def test_each_function_refuses_what_its_setting_cannot_be(function, value):
    with pytest.raises(ValueError, match=rf"{value}\b"):
        function(NINE_WORDS, value)


@pytest.mark.parametrize(("function", "value"), [(penalize_repetition, 0), (forbid_repeated_ngrams, -1)])
def test_each_function_of_earlier_tokens_refuses_what_its_setting_cannot_be(function, value):
    with pytest.raises(ValueError, match=rf"{value}\b"):
        function(NINE_WORDS, EARLIER[:1], value)
