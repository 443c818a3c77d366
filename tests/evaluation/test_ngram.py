"""The n-gram yardstick: right to the last digit, a probability, and scored on the GPT's own targets."""

import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from hfgpt.evaluation.ngram import BigramModel, NgramPerplexities, ngram_perplexities

DISCOUNT = 0.75


def random_rows(seed: int, num_rows: int, block_size: int, vocab_size: int) -> np.ndarray:
    """Rows (N, T + 1) overlapping by one token, cut from a skewed random stream."""
    generator = np.random.default_rng(seed)
    stream = generator.zipf(1.5, num_rows * block_size + 1) % vocab_size
    return np.stack([stream[i * block_size : (i + 1) * block_size + 1] for i in range(num_rows)])


def count_by_dictionary(train_rows, validation_rows, vocab_size: int) -> NgramPerplexities:
    """The formulas of `BigramModel`, pair by pair."""
    train_pairs = [pair for row in train_rows.tolist() for pair in pairwise(row)]
    followers: dict[int, Counter[int]] = defaultdict(Counter)
    for context, target in train_pairs:
        followers[context][target] += 1
    targets = Counter(target for _, target in train_pairs)

    def unigram(target: int) -> float:
        return (targets[target] + 1) / (len(train_pairs) + vocab_size)

    def bigram(context: int, target: int) -> float:
        if context not in followers:
            return unigram(target)
        seen = followers[context]
        return (max(seen[target] - DISCOUNT, 0) + DISCOUNT * len(seen) * unigram(target)) / seen.total()

    scored = [pair for row in validation_rows.tolist() for pair in pairwise(row)]
    return NgramPerplexities(
        unigram=math.exp(-math.fsum(math.log(unigram(target)) for _, target in scored) / len(scored)),
        bigram=math.exp(-math.fsum(math.log(bigram(*pair)) for pair in scored) / len(scored)),
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [np.int64, np.uint16])
def test_perplexities_equal_a_count_by_dictionary(seed, dtype):
    vocab_size = 300  # codes up to 90,000 do not fit uint16; most contexts of the validation rows are unseen
    train_rows = random_rows(seed, num_rows=20, block_size=16, vocab_size=vocab_size).astype(dtype)
    validation_rows = random_rows(seed + 100, num_rows=7, block_size=9, vocab_size=vocab_size).astype(dtype)

    found = ngram_perplexities(train_rows, validation_rows, vocab_size)

    expected = count_by_dictionary(train_rows, validation_rows, vocab_size)
    assert found.unigram == pytest.approx(expected.unigram, rel=1e-12)  # float64 sums in another order
    assert found.bigram == pytest.approx(expected.bigram, rel=1e-12)


@pytest.mark.parametrize("discount", [0.1, 0.75, 1.0])
def test_probabilities_sum_to_one_after_seen_and_unseen_contexts(discount):
    vocab_size = 12
    train_rows = random_rows(0, num_rows=6, block_size=8, vocab_size=vocab_size - 1)  # token 11 never occurs
    model = BigramModel(train_rows, vocab_size, discount)
    vocabulary = np.arange(vocab_size)

    for context in vocabulary:
        probabilities = np.exp(model.log_probability(np.full(vocab_size, context), vocabulary))
        assert probabilities.min() > 0
        assert probabilities.sum() == pytest.approx(1, rel=1e-12)
    assert np.exp(model.unigram_log_probability(vocabulary)).sum() == pytest.approx(1, rel=1e-12)


def test_an_unseen_context_falls_back_to_the_unigram():
    model = BigramModel(np.array([[0, 1, 0, 1, 2]]), vocab_size=5)
    targets = np.arange(5)

    after_unseen = model.log_probability(np.full(5, 4), targets)

    np.testing.assert_array_equal(after_unseen, model.unigram_log_probability(targets))
    # 4 targets: 1 twice, 0 and 2 once; add-one over 5 tokens
    np.testing.assert_allclose(np.exp(after_unseen), np.array([2, 3, 2, 1, 1]) / 9, rtol=1e-12)


def test_a_cycle_is_certain_to_the_bigram_and_not_to_the_unigram():
    vocab_size, block_size = 10, 50
    stream = np.arange(200 * block_size + 1) % vocab_size
    rows = np.stack([stream[i * block_size : (i + 1) * block_size + 1] for i in range(200)])

    found = ngram_perplexities(rows[:180], rows[180:], vocab_size)

    assert found.bigram == pytest.approx(1, abs=1e-3)  # D / n(c) = 0.75 / 900 goes to the other tokens
    assert found.unigram == pytest.approx(vocab_size, rel=1e-9)


def test_the_way_a_stream_is_cut_into_rows_changes_nothing():
    stream = np.random.default_rng(0).integers(0, 20, 24 * 10 + 1)
    long, short = (
        np.stack([stream[i : i + block_size + 1] for i in range(0, 240, block_size)]) for block_size in (24, 8)
    )

    assert ngram_perplexities(long, long, 20) == ngram_perplexities(short, short, 20)


@pytest.mark.parametrize("rows", [np.zeros((0, 5), int), np.zeros((3, 1), int), np.zeros(5, int)])
def test_rows_without_a_pair_are_refused(rows):
    good = np.zeros((1, 2), int)

    with pytest.raises(ValueError, match="`train_rows` must have shape"):
        ngram_perplexities(rows, good, 4)
    with pytest.raises(ValueError, match="`validation_rows` must have shape"):
        ngram_perplexities(good, rows, 4)


@pytest.mark.parametrize("token", [-1, 4])
@pytest.mark.parametrize("column", [0, 2])
def test_a_token_outside_the_vocabulary_is_refused(token, column):
    good = np.ones((2, 3), int)
    bad = good.copy()
    bad[1, column] = token

    with pytest.raises(ValueError, match=r"`train_rows` holds token ids from .*`vocab_size` \(4\)"):
        ngram_perplexities(bad, good, 4)
    with pytest.raises(ValueError, match="`validation_rows` holds token ids from"):
        ngram_perplexities(good, bad, 4)


def test_rows_of_fractions_are_refused():
    with pytest.raises(ValueError, match=r"whole numbers, got float64"):
        ngram_perplexities(np.ones((1, 3)), np.ones((1, 3), int), 4)


@pytest.mark.parametrize("discount", [0, -0.5, 1.1, math.nan])
def test_a_discount_that_is_no_share_of_a_count_is_refused(discount):
    with pytest.raises(ValueError, match=r"`discount` must be in \(0, 1\]"):
        BigramModel(np.ones((1, 3), int), 4, discount)
