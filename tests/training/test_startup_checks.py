"""Is my run normal? What is normal passes, and every trap is found, with its number."""

import math

import numpy as np
import pytest
import torch

from hfgpt import HFGPTConfig, HFGPTForCausalLM
from hfgpt.training import startup_checks as sanity
from hfgpt.training.startup_checks import (
    check_duplicates,
    check_loss,
    check_next_token,
    check_padding,
    check_range,
    check_shift,
    duplicated_share,
    window_hashes,
)


class Stream:
    """Ids in memory, sliced as `TokenArray` slices those on the disk."""

    def __init__(self, ids):
        self.ids = np.asarray(ids, dtype=np.int32)

    def __len__(self):
        return len(self.ids)

    def slice(self, start, stop):
        return self.ids[start:stop]


class FewRows:
    """Rows of T + 1 ids, as `TokenRows` gives them."""

    def __init__(self, ids):
        self.ids = np.asarray(ids, dtype=np.int32)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index]}


def draw(count, seed, vocab_size=300):
    return np.random.default_rng(seed).integers(vocab_size, size=count, dtype=np.int32)


@pytest.fixture
def rows():
    ids = draw(4 * 33, seed=0).reshape(4, 33)
    ids[3, 20:] = -100  # a row that is filled up
    return FewRows(ids)


@pytest.mark.parametrize(
    ("loss", "is_new", "is_normal", "word"),
    [
        (5.8, True, True, "5.70"),
        (4.0, True, False, "see the tokens"),
        (7.5, True, False, "initializer_range"),
        (4.0, False, True, "5.70"),
        (5.8, False, False, "tokenizer"),
    ],
)
def test_a_loss_is_compared_with_that_of_guessing(loss, is_new, is_normal, word):
    check = check_loss(loss, vocab_size=300, is_new=is_new)

    assert (check.value, check.is_normal) == (loss, is_normal)
    assert word in check.text


def test_targets_that_are_the_next_token_are_normal_and_others_found(rows, monkeypatch):
    assert check_shift(rows) == sanity.Check(1.0, True, "100.0% of the targets are the next token")

    right = sanity.collate
    monkeypatch.setattr(
        sanity, "collate", lambda rows: {**right(rows), "shift_labels": right(rows)["shift_labels"].roll(-1, dims=1)}
    )
    check = check_shift(rows)

    assert check.value < 0.05
    assert not check.is_normal


def test_the_loss_that_is_trained_is_that_of_the_next_token_by_hand(rows, tiny, monkeypatch):
    torch.manual_seed(0)
    model = HFGPTForCausalLM(HFGPTConfig(**{**tiny, "initializer_range": 0.2}))
    before = torch.get_rng_state()

    check = check_next_token(model, rows)

    assert check.is_normal
    assert abs(check.value) < 1e-5  # fp32 sums in another order
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)

    right = sanity.collate
    monkeypatch.setattr(
        sanity, "collate", lambda rows: {**right(rows), "shift_labels": right(rows)["input_ids"]}
    )  # not shifted at all
    check = check_next_token(model, rows)
    assert not check.is_normal
    assert "shifted twice, or not at all" in check.text


def test_ids_that_the_model_does_not_know_are_counted(rows):
    assert check_range(rows, vocab_size=300).value == 0

    check = check_range(rows, vocab_size=150)

    ids = rows.ids[rows.ids != -100]
    assert check.value == pytest.approx((ids >= 150).mean())
    assert not check.is_normal


@pytest.mark.parametrize(("padding", "targets", "share"), [(0, 100, 0.0), (100, 300, 0.25), (300, 100, 0.75)])
def test_padding_is_a_share_of_all_places(padding, targets, share):
    check = check_padding(padding, targets)

    assert check.value == share
    assert check.is_normal == (share < 0.5)


def test_hashes_are_equal_exactly_where_windows_are():
    ids = draw(3000, seed=1, vocab_size=3)  # few ids, so that windows differ little from one another
    ids[2000:2200] = ids[100:300]
    window = sanity.WINDOW

    hashes = window_hashes(ids)

    windows = [tuple(ids[start : start + window]) for start in range(len(ids) - window + 1)]
    assert len(hashes) == len(windows)
    assert len(set(hashes.tolist())) == len(set(windows)) < len(windows)
    assert [hashes[start] for start in (2000, 2136)] == [hashes[start] for start in (100, 236)]


@pytest.mark.parametrize("offset", [0, 1, 37, 5000])
def test_duplicates_are_found_wherever_they_begin(offset):
    train, validation = draw(60_000, seed=2), draw(20_000, seed=3)
    validation[6000:11_000] = train[offset : offset + 5000]

    share = duplicated_share(Stream(train), Stream(validation))

    # One window of eight is looked up: of 2,500 windows the share is off by at most 3 standard deviations.
    assert share == pytest.approx(5000 / 20_000, abs=3 * math.sqrt(0.25 * 0.75 / 2500))
    assert check_duplicates(Stream(train), Stream(validation)).is_normal is False


def test_text_of_its_own_has_no_duplicates_however_long_it_is(monkeypatch):
    monkeypatch.setattr(sanity, "PIECE", 1000)
    monkeypatch.setattr(sanity, "MOST_POSITIONS", 10_000)  # pieces are left out

    check = check_duplicates(Stream(draw(50_000, seed=4)), Stream(draw(3000, seed=5)))

    assert check.value == 0
    assert check.is_normal


def test_pieces_join_without_losing_or_doubling_a_window(monkeypatch):
    ids = draw(5000, seed=6)
    whole = sanity.chosen_windows(Stream(ids))

    monkeypatch.setattr(sanity, "PIECE", 700)

    assert np.array_equal(sanity.chosen_windows(Stream(ids)), whole)


def test_a_split_shorter_than_a_window_has_no_duplicates():
    assert duplicated_share(Stream(draw(1000, seed=7)), Stream(draw(10, seed=8))) == 0
