"""Rows are what was asked for, whatever the array behind them looks like."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from small_rows import ids_of, numbered_rows, token_array

from hfgpt.config.schema import DataConfig
from hfgpt.data.loaders import collate
from hfgpt.data.prepare import make_rows


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=12),
    st.integers(1, 5),
    st.data(),
)
def test_an_array_in_parts_gives_what_one_in_memory_gives(documents, parts, draw):
    from unittest.mock import patch

    whole = [0, *(token for document in documents for token in [*document, 0])]
    tokens = token_array([[0, *document] for document in documents])
    cuts = sorted({0, len(tokens), *draw.draw(st.lists(st.integers(0, len(tokens)), max_size=parts))})
    pieces = [tokens.slice(*cut) for cut in itertools.pairwise(cuts)]
    start = draw.draw(st.integers(0, len(tokens) - 1))
    stop = draw.draw(st.integers(start + 1, len(tokens) + 1))

    with (
        patch.object(tokens, "parts", pieces),
        patch.object(tokens, "part_ends", np.cumsum([len(piece) for piece in pieces]).tolist()),
    ):
        assert tokens.slice(start, stop).tolist() == whole[start:stop]
    assert tokens.document_starts.tolist() == [at for at, token in enumerate(whole[:-1]) if token == 0]


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=2, max_size=12), st.integers(1, 7))
def test_isolated_rows_are_the_same_with_positions_that_begin_with_each_document(documents, block_size):
    tokens = token_array([[0, *document] for document in documents])
    if len(tokens) < block_size + 2:
        return

    plain, counts = make_rows(tokens, DataConfig(block_size=block_size), "training")
    isolated, isolated_counts = make_rows(tokens, DataConfig(block_size=block_size, packing="isolated"), "training")

    assert ids_of(isolated) == ids_of(plain)
    assert isolated_counts == counts
    for index in range(len(isolated)):
        row, expected, position = isolated[index], [], -1
        for token in row["input_ids"][:-1]:
            position = 0 if token == 0 else position + 1  # by brute force
            expected.append(position)
        assert row["position_ids"].tolist() == expected


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=12), st.integers(1, 7))
def test_padded_rows_hold_one_document_and_score_every_token_once(documents, block_size):
    tokens = token_array([[0, *document] for document in documents])

    rows, counts = make_rows(tokens, DataConfig(block_size=block_size, packing="padded"), "training")

    found = iter(ids_of(rows))
    for document in documents:
        framed = [0, *document, 0]
        for start in range(0, len(framed) - 1, block_size):
            row = framed[start : start + block_size + 1]
            assert next(found) == row + [-100] * (block_size + 1 - len(row))
    assert next(found, None) is None
    targets = collate([rows[index] for index in range(len(rows))])["shift_labels"]
    assert int((targets != -100).sum()) == counts.targets == sum(map(len, documents)) + len(documents)
    assert counts.tokens == sum(map(len, documents)) + len(documents) - 1
    assert counts.padding == targets.numel() - counts.targets
    assert counts.remainder == 0
    assert len(rows.pairs()) == counts.targets


def test_the_pairs_of_rows_are_their_targets_behind_the_ids_before_them():
    assert numbered_rows(2, block_size=2).pairs().tolist() == [[0, 1], [1, 2], [10, 11], [11, 12]]


def test_walking_over_rows_ends_before_the_filler():
    assert [row["input_ids"].tolist() for row in numbered_rows(2, block_size=2)] == ids_of(
        numbered_rows(2, block_size=2)
    )
