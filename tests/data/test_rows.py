import itertools
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfgpt.config.schema import DataConfig
from hfgpt.data.loaders import EpochBatches, collate, epoch_order, eval_loader, train_loader
from hfgpt.data.prepare import check_ids, lay_rows, load_rows
from hfgpt.data.rows import TokenArray, TokenRows
from hfgpt.data.text import Documents, load_documents
from hfgpt.data.tokenizer import encode_ids, train_tokenizer

TEXTS = [f"Line {i}: the quick brown fox jumps over the lazy dog.\r\n" for i in range(40)]
ODD = ["a\r\nb\rc\n", "\0", "\ufeffe\u0301", "\U0001f600 한국어", "<|endoftext|>", "the"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        datasets.disable_progress_bars()
        yield folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300, model_max_length=64)


def as_documents(train, validation):
    return Documents(*(datasets.Dataset.from_dict({"text": texts}) for texts in (train, validation)))


def as_stream(documents):
    """A stream of documents given as lists of ids, each with its end-of-text in front."""
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    return TokenArray(datasets.Dataset.from_dict({"input_ids": documents}, features=features))


def numbered_rows(count, block_size=4):
    """Rows whose ids tell where they stand: row 2 is 20, 21, 22 ..."""
    ids = [[10 * row + column for column in range(block_size + 1)] for row in range(count)]
    return TokenRows(as_stream(ids), block_size, range(0, count * (block_size + 1), block_size + 1))


def ids_of(rows):
    return [rows[index]["input_ids"].tolist() for index in range(len(rows))]


def stream_of(rows, stride):
    """The stream that overlapping rows were cut from, each of its ids once."""
    ids = np.array(ids_of(rows))
    return [*ids[:, :stride].reshape(-1).tolist(), *ids[-1, stride:].tolist()]


def decode_stream(tokenizer, stream):
    ends = [i for i, token in enumerate(stream) if token == tokenizer.eos_token_id]
    parts = [stream[start:end] for start, end in zip([0, *(i + 1 for i in ends)], [*ends, None], strict=True)]
    return [tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in parts]


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from(ODD) | st.text(min_size=1, max_size=20), min_size=2, max_size=70),
    st.integers(2, 12),
    st.data(),
)
def test_blocks_joined_decode_to_the_text(tokenizer, texts, block_size, draw):
    stride = draw.draw(st.integers(1, block_size))
    documents = as_documents(texts, TEXTS)

    whole = load_rows(documents, tokenizer, DataConfig(block_size=1)).train  # a block of 1 leaves no remainder
    stream = stream_of(whole, 1)
    assert decode_stream(tokenizer, stream) == texts

    if len(stream) > block_size:
        rows = load_rows(documents, tokenizer, DataConfig(block_size=block_size, stride=stride))
        remainder = rows.train_counts.remainder
        assert stream_of(rows.train, stride) == stream[: len(stream) - remainder]
        assert remainder < stride
        assert rows.train_counts.tokens == len(stream)


def test_only_the_last_partial_block_is_lost(tokenizer):
    tokens = sum(map(len, encode_ids(tokenizer, TEXTS))) + len(TEXTS) - 1

    rows = load_rows(as_documents(TEXTS, TEXTS[:3]), tokenizer, DataConfig(block_size=16))

    counts = rows.train_counts
    assert counts.tokens == tokens
    assert counts.targets == 16 * len(rows.train) == 16 * ((tokens - 1) // 16)
    assert counts.remainder == (tokens - 1) % 16
    assert counts.tokens == 1 + counts.targets + counts.remainder
    assert rows.validation_counts.tokens == sum(map(len, encode_ids(tokenizer, TEXTS[:3]))) + 2


def test_documents_are_separated_by_the_end_of_text_and_the_last_one_is_not_ended(tokenizer):
    rows = load_rows(as_documents(["a", "b", "c"], TEXTS), tokenizer, DataConfig(block_size=1))

    a, b, c = (ids[0] for ids in encode_ids(tokenizer, ["a", "b", "c"]))
    end = tokenizer.eos_token_id
    assert ids_of(rows.train) == [[a, end], [end, b], [b, end], [end, c]]


def test_many_documents_make_one_stream(tokenizer):
    texts = [f"{i}" for i in range(1000)]

    rows = load_rows(as_documents(texts, TEXTS), tokenizer, DataConfig(block_size=1)).train

    assert decode_stream(tokenizer, stream_of(rows, 1)) == texts


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_rows_start_every_stride_tokens(tokenizer, stride):
    stream = stream_of(load_rows(as_documents(TEXTS, TEXTS), tokenizer, DataConfig(block_size=1)).train, 1)

    rows = load_rows(as_documents(TEXTS, TEXTS), tokenizer, DataConfig(block_size=8, stride=stride)).train

    assert ids_of(rows) == [stream[i : i + 9] for i in range(0, len(stream) - 8, stride)]


def test_every_number_of_tokenizing_processes_gives_the_same_rows(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one " * 50)
    (tmp_path / "b.txt").write_text("two " * 50)
    (tmp_path / "c.txt").write_text("three " * 50)
    documents = load_documents(DataConfig(files=str(tmp_path)), seed=0)

    two = load_rows(documents, tokenizer, DataConfig(block_size=8, num_proc=2))
    fresh = as_documents(documents.train["text"][:], documents.validation["text"][:])
    one = load_rows(fresh, tokenizer, DataConfig(block_size=8))

    assert ids_of(two.train) == ids_of(one.train)
    assert two.train_counts == one.train_counts


def cached_files(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*.arrow")}


def test_rows_are_memory_mapped_and_made_once(tokenizer, tmp_path, cache):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    data = DataConfig(files=str(tmp_path), block_size=8)
    rows = load_rows(load_documents(data, seed=0), tokenizer, data)
    files = cached_files(cache)

    again = load_rows(load_documents(data, seed=0), tokenizer, data)

    assert ids_of(again.train) == ids_of(rows.train)
    assert cached_files(cache) == files


def test_other_texts_and_tokenizers_make_other_files_and_other_rows_none(tokenizer, tmp_path, cache):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    data = DataConfig(files=str(tmp_path), block_size=8)
    other_tokenizer = train_tokenizer(TEXTS[:1], vocab_size=280, model_max_length=64)
    documents, other_documents = load_documents(data, seed=0), load_documents(data, seed=1)
    load_rows(documents, tokenizer, data)

    made = []
    for seeded, chosen, block_size, stride, packing in [
        (documents, tokenizer, 9, None, "contiguous"),
        (documents, tokenizer, 8, 5, "contiguous"),
        (documents, tokenizer, 8, None, "isolated"),
        (documents, tokenizer, 8, None, "padded"),
        (other_documents, tokenizer, 8, None, "contiguous"),
        (documents, other_tokenizer, 8, None, "contiguous"),
    ]:
        before = cached_files(cache)
        load_rows(seeded, chosen, DataConfig(block_size=block_size, stride=stride, packing=packing))
        made.append(len(cached_files(cache)) - len(before))

    assert made == [0, 0, 0, 0, 2, 2]  # training and validation ids


PROCESS = """
import sys, datasets
from hfgpt.config.schema import DataConfig
from hfgpt.data.prepare import load_rows
from hfgpt.data.text import load_documents
from hfgpt.data.tokenizer import load_tokenizer
datasets.config.HF_DATASETS_CACHE = sys.argv[1]
datasets.disable_progress_bars()
data = DataConfig(files=sys.argv[2], block_size=8)
rows = load_rows(load_documents(data, seed=0), load_tokenizer(sys.argv[3]), data)
sys.stdout.write(str([rows.train[index]["input_ids"].tolist() for index in range(len(rows.train))]))
"""


def test_another_process_finds_the_rows_in_the_cache(tokenizer, tmp_path, cache):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = tmp_path / "text"
    text.mkdir()
    for i, line in enumerate(TEXTS):
        (text / f"{i}.txt").write_text(line)
    (text / "more.jsonl").write_text('{"text": "more"}\n{"text": ""}\n')
    data = DataConfig(files=str(text), block_size=8)
    rows = load_rows(load_documents(data, seed=0), tokenizer, data)
    files = cached_files(cache)

    command = [sys.executable, "-c", PROCESS, str(cache), str(text), str(tmp_path / "tokenizer")]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert found == str(ids_of(rows.train))
    assert cached_files(cache) == files


def test_a_word_of_the_validation_text_alone_is_no_token(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "an apple"}\n' * 5)
    (tmp_path / "validation.jsonl").write_text('{"text": "a zyzzyva"}\n' * 5)
    train, validation = str(tmp_path / "train.jsonl"), str(tmp_path / "validation.jsonl")
    documents = load_documents(DataConfig(files=train, validation_files=validation), seed=0)

    tokenizer = train_tokenizer(documents.train["text"], vocab_size=300, model_max_length=8)

    assert tokenizer.tokenize(" apple") == ["Ġapple"]
    assert len(tokenizer.tokenize(" zyzzyva")) == len(" zyzzyva")


def test_a_split_shorter_than_one_block_is_refused(tokenizer):
    message = r"the validation split has 3 tokens, fewer than one block of 4 .* lower `data\.block_size` \(3\)"
    with pytest.raises(ValueError, match=message):
        load_rows(as_documents(TEXTS, ["\0\0\0"]), tokenizer, DataConfig(block_size=3))

    exact = load_rows(as_documents(TEXTS, ["\0\0\0"]), tokenizer, DataConfig(block_size=2))
    assert (len(exact.validation), exact.validation_counts.remainder) == (1, 0)


def test_ids_that_the_model_does_not_know_are_refused():
    rows = numbered_rows(3)

    check_ids(rows, 25, "training")
    with pytest.raises(ValueError, match=r"the training rows hold the id 24, but the model's `vocab_size` is 24"):
        check_ids(rows, 24, "training")


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


def is_view_of(part, whole):
    return np.shares_memory(part, whole)


def test_rows_are_views_of_the_file_and_copy_nothing(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox " * 5000)
    data = DataConfig(files=str(tmp_path), block_size=64)

    rows = load_rows(load_documents(data, seed=0), tokenizer, data).train

    [part] = rows.tokens.parts
    assert not part.flags.writeable
    assert all(is_view_of(rows[index]["input_ids"], part) for index in range(len(rows)))


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=12),
    st.integers(1, 5),
    st.data(),
)
def test_a_stream_in_parts_gives_what_one_in_memory_gives(documents, parts, draw):
    from unittest.mock import patch

    whole = [0, *(token for document in documents for token in [*document, 0])]
    stream = as_stream([[0, *document] for document in documents])
    cuts = sorted({0, len(stream), *draw.draw(st.lists(st.integers(0, len(stream)), max_size=parts))})
    pieces = [stream.slice(*cut) for cut in itertools.pairwise(cuts)]
    start = draw.draw(st.integers(0, len(stream) - 1))
    stop = draw.draw(st.integers(start + 1, len(stream) + 1))

    with (
        patch.object(stream, "parts", pieces),
        patch.object(stream, "part_ends", np.cumsum([len(piece) for piece in pieces]).tolist()),
    ):
        assert stream.slice(start, stop).tolist() == whole[start:stop]
    assert stream.document_starts.tolist() == [at for at, token in enumerate(whole[:-1]) if token == 0]


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=2, max_size=12), st.integers(1, 7))
def test_isolated_rows_are_the_same_with_positions_that_begin_with_each_document(documents, block_size):
    stream = as_stream([[0, *document] for document in documents])
    if len(stream) < block_size + 2:
        return

    plain, counts = lay_rows(stream, DataConfig(block_size=block_size), "training")
    isolated, isolated_counts = lay_rows(stream, DataConfig(block_size=block_size, packing="isolated"), "training")

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
    stream = as_stream([[0, *document] for document in documents])

    rows, counts = lay_rows(stream, DataConfig(block_size=block_size, packing="padded"), "training")

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


def test_a_filler_has_positions_too():
    rows = TokenRows(as_stream([[0, 1, 2, 3, 4]]), 4, [0], is_isolated=True)

    batch = collate([rows[0], rows[1]])

    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
    assert batch["shift_labels"].tolist() == [[1, 2, 3, 4], [-100] * 4]
    with pytest.raises(IndexError, match="there are 1 rows, got 2"):
        rows[2]


def test_walking_over_rows_ends_before_the_filler():
    assert [row["input_ids"].tolist() for row in numbered_rows(2, block_size=2)] == ids_of(
        numbered_rows(2, block_size=2)
    )
