"""In which order rows are seen, and by which process."""

import pytest
import torch
from small_rows import numbered_rows, token_array

from hfgpt.data.loaders import EpochBatches, collate, epoch_order, eval_loader, train_loader
from hfgpt.data.rows import TokenRows


def test_a_micro_batch_has_the_next_token_as_label():
    rows = numbered_rows(3)

    batch = collate([rows[2], rows[0], rows[3]])  # the last is the filler

    assert batch["input_ids"].tolist()[:2] == batch["labels"].tolist()[:2] == [[20, 21, 22, 23], [0, 1, 2, 3]]
    assert batch["shift_labels"].tolist() == [[21, 22, 23, 24], [1, 2, 3, 4], [-100] * 4]
    assert batch["labels"].tolist()[2] == [-100] * 4
    assert batch["input_ids"].tolist()[2] == [0] * 4
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 4, 7, 12, 13])
@pytest.mark.parametrize("loader", ["train", "eval"])
def test_every_target_is_scored_once_over_all_processes(world_size, count, loader):
    rows = numbered_rows(count)
    make = {
        "train": lambda rank: train_loader(rows, 2, seed=5, rank=rank, world_size=world_size),
        "eval": lambda rank: eval_loader(rows, 2, rank, world_size),
    }[loader]

    batches = [list(make(rank)) for rank in range(world_size)]

    targets = torch.cat([batch["shift_labels"].flatten() for own in batches for batch in own])
    expected = [10 * row + column for row in range(count) for column in range(1, 5)]
    assert sorted(targets[targets != -100].tolist()) == expected
    shapes = [[batch["input_ids"].shape for batch in own] for own in batches]
    assert shapes == [shapes[0]] * world_size
    assert len(shapes[0]) == len(make(0))


def test_rows_are_evaluated_in_order():
    first = [batch["input_ids"][:, 0].tolist() for batch in eval_loader(numbered_rows(5), 2)]

    assert first == [[0, 10], [20, 30], [40]]


def test_one_process_sees_at_every_step_the_rows_that_two_see():
    one = EpochBatches(11, batch_size=4, seed=3)
    two = [EpochBatches(11, batch_size=2, seed=3, rank=rank, world_size=2) for rank in range(2)]

    for batch, left, right in zip(one, *two, strict=True):
        assert sorted(batch) == sorted(row for row in left + right if row != 11)
    assert len(one) == len(two[0]) == 3


def test_each_epoch_has_its_own_order_that_the_seed_fixes():
    orders = [epoch_order(50, seed, epoch).tolist() for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 0)]]

    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_an_epoch_goes_on_where_it_stopped():
    batches = EpochBatches(10, batch_size=3, seed=0)
    batches.set_epoch(1)
    whole = list(batches)

    batches.skip_to(2)
    rest, length = list(batches), len(batches)
    batches.set_epoch(2)

    assert rest == whole[2:]
    assert length == len(whole) == 4
    assert len(list(batches)) == 4
    assert [row for batch in whole for row in batch] == epoch_order(10, seed=0, epoch=1).tolist()
    for start in [-1, 5]:
        with pytest.raises(ValueError, match=f"an epoch has 4 micro-batches, got {start}"):
            batches.skip_to(start)


def test_starting_an_epoch_draws_nothing_from_the_global_rng():
    state = torch.get_rng_state()

    assert len(list(train_loader(numbered_rows(7), 2, seed=0))) == 4
    assert len(list(eval_loader(numbered_rows(7), 2))) == 4

    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 on fork
def test_workers_load_the_same_micro_batches():
    alone = list(train_loader(numbered_rows(9), 2, seed=0))
    helped = list(train_loader(numbered_rows(9), 2, seed=0, num_workers=2))

    assert [batch["input_ids"].tolist() for batch in helped] == [batch["input_ids"].tolist() for batch in alone]


def test_a_filler_has_positions_too():
    rows = TokenRows(token_array([[0, 1, 2, 3, 4]]), 4, [0], is_isolated=True)

    batch = collate([rows[0], rows[1]])

    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
    assert batch["shift_labels"].tolist() == [[1, 2, 3, 4], [-100] * 4]
    with pytest.raises(IndexError, match="there are 1 rows, got 2"):
        rows[2]
