import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from odd_tokenizers import characters

from hfgpt.config.loading import load_config
from hfgpt.config.schema import DataConfig
from hfgpt.data.loaders import stream_loader
from hfgpt.data.prepare import load_rows, stream_rows
from hfgpt.data.streaming import StreamedRows, hashes, sample_documents
from hfgpt.data.text import load_documents, stream_texts
from hfgpt.data.tokenizer import encode_ids

TEXTS = [f"Document {i}: " + "the quick brown fox " * (i % 7) + "\r\nends." for i in range(60)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The texts in four shards, with empty documents between them."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(4):
        lines = [json.dumps({"text": text}) for i in range(shard, 60, 4) for text in (TEXTS[i], "")]
        (folder / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture
def streamed(files):
    def make(**changes):
        return DataConfig(
            **{"files": files, "streaming": True, "block_size": 16, "validation_documents": 6, "shuffle_buffer": 7}
            | changes
        )

    return make


def take(rows, count):
    iterator = iter(rows)
    return [next(iterator) for _ in range(count)]


def as_lists(rows):
    return [{name: array.tolist() for name, array in row.items()} for row in rows]


def documents_of(stream, tokenizer, count):
    return [tokenizer.decode(stream.next_document()[1:]) for _ in range(count)]


def test_each_epoch_gives_every_training_document_once_and_no_validation_document(streamed, tokenizer):
    data = streamed()
    samples = sample_documents(data, seed=0)
    held_out = set(samples.validation["text"])
    stream = StreamedRows(data, hashes(samples.validation), tokenizer, seed=0)

    first, second = documents_of(stream, tokenizer, 54), documents_of(stream, tokenizer, 54)

    assert len(held_out) == 6
    assert sorted(first) == sorted(second) == sorted(set(TEXTS) - held_out)
    assert first != second
    assert first != sorted(first)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_documents_and_no_document_comes_twice(streamed, tokenizer, world_size):
    data = streamed()
    held_out = hashes(sample_documents(data, seed=0).validation)

    shares = []
    for rank in range(world_size):
        stream = StreamedRows(data, held_out, tokenizer, 0, rank, world_size)
        share = []
        while stream.epoch == 0:
            share += documents_of(stream, tokenizer, 1)
        shares += share[:-1]  # the last one is of the next epoch

    assert sorted(shares) == sorted(text for text in TEXTS if text in shares)
    assert len(shares) == 54


def test_without_shuffling_documents_come_in_the_order_of_the_source(streamed, tokenizer):
    data = streamed(shuffle_documents=False, shuffle_buffer=1000)

    stream = StreamedRows(data, frozenset(), tokenizer, seed=0)

    assert documents_of(stream, tokenizer, 60) == [TEXTS[i] for shard in range(4) for i in range(shard, 60, 4)]


def test_without_a_separator_rows_hold_the_documents_and_nothing_else(streamed, files):
    tokenizer = characters("".join(TEXTS))
    data = streamed(separator=None, shuffle_documents=False, shuffle_buffer=1000)
    text = "".join(TEXTS[i] for shard in range(4) for i in range(shard, 60, 4))

    rows = take(StreamedRows(data, frozenset(), tokenizer, seed=0), 20)

    assert "".join(tokenizer.decode(row["input_ids"][:-1]) for row in rows) == text[: 20 * 16]
    stored = load_rows(load_documents(replace(data, streaming=False), 0), tokenizer, replace(data, streaming=False))
    assert [row["input_ids"].tolist() for row in stored.train][:20] == [row["input_ids"].tolist() for row in rows]
    assert stored.train_counts.tokens + stored.validation_counts.tokens == len(text)


@pytest.mark.parametrize("packing", ["contiguous", "isolated", "padded"])
def test_rows_hold_every_token_of_the_documents_in_order(streamed, tokenizer, packing):
    data = streamed(packing=packing, shuffle_documents=False, shuffle_buffer=1000)
    end = tokenizer.eos_token_id
    ordered = [TEXTS[i] for shard in range(4) for i in range(shard, 60, 4)]
    framed = [[end, *ids] for ids in encode_ids(tokenizer, ordered)]
    whole = [token for ids in framed for token in ids]

    rows = as_lists(take(StreamedRows(data, frozenset(), tokenizer, seed=0), 60))

    if packing == "padded":
        expected = []
        for ids in framed:
            closed = [*ids, end]
            cut = [closed[start : start + 17] for start in range(0, len(closed) - 1, 16)]
            expected += [row + [-100] * (17 - len(row)) for row in cut]
        assert [row["input_ids"] for row in rows] == expected[:60]
        return
    assert [row["input_ids"] for row in rows] == [whole[start : start + 17] for start in range(0, 960, 16)]
    if packing == "isolated":
        for row in rows:
            position, expected = -1, []
            for token in row["input_ids"][:-1]:
                position = 0 if token == end else position + 1
                expected.append(position)
            assert row["position_ids"] == expected


@pytest.mark.parametrize("packing", ["contiguous", "isolated", "padded"])
@pytest.mark.parametrize("stopped_at", [0, 1, 29, 150, 333])
def test_a_stream_goes_on_where_it_stopped_to_the_last_id(streamed, tokenizer, tmp_path, packing, stopped_at):
    data = streamed(packing=packing)

    def begin():
        return StreamedRows(data, hashes(sample_documents(data, seed=1).validation), tokenizer, seed=1)

    whole = as_lists(take(begin(), stopped_at + 300))  # some epochs
    stream = begin()
    take(stream, stopped_at)
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    other = begin()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))

    assert as_lists(take(other, 300)) == whole[stopped_at:]


def test_another_seed_is_another_order_and_the_same_seed_the_same(streamed, tokenizer):
    one, same, other = (
        as_lists(take(StreamedRows(streamed(), frozenset(), tokenizer, seed=seed), 20)) for seed in (0, 0, 1)
    )

    assert one == same != other


def test_the_stored_sample_has_as_many_training_documents_as_validation_documents(streamed, tokenizer):
    rows = stream_rows(streamed(), tokenizer, seed=0, rank=0, world_size=1)

    [batch] = take(stream_loader(rows.streamed, 3), 1)

    assert rows.train_counts.tokens > 0
    assert batch["input_ids"].shape == (3, 16)
    assert torch.equal(batch["shift_labels"][:, :-1], batch["input_ids"][:, 1:])
    assert len(sample_documents(streamed(), seed=0).train) == 6


def test_plain_text_files_are_documents_of_a_stream_too(tmp_path, tokenizer):
    for i, text in enumerate(TEXTS[:9]):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    data = DataConfig(files=str(tmp_path), streaming=True, shuffle_documents=False)

    stream = StreamedRows(data, frozenset(), tokenizer, seed=0)

    assert documents_of(stream, tokenizer, 9) == TEXTS[:9]


def test_a_validation_text_that_is_named_is_left_out_of_the_stream_as_well(streamed, tmp_path, tokenizer):
    (tmp_path / "validation.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[10:13]))
    data = streamed(validation_files=str(tmp_path / "validation.jsonl"), validation_documents=1000)

    samples = sample_documents(data, seed=0)
    stream = StreamedRows(data, hashes(samples.validation), tokenizer, seed=0)

    assert samples.validation["text"][:] == TEXTS[10:13]
    assert sorted(documents_of(stream, tokenizer, 57)) == sorted(set(TEXTS) - set(TEXTS[10:13]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_documents": 61}, r"the source has 60 documents, `data.validation_documents` are 61"),
        ({"validation_documents": 60}, r"no document beside those of the validation text"),
        ({"text_column": "words"}, r"has no column 'words', only \['text'\]. Set `data.text_column`"),
        ({"files": "nowhere.jsonl"}, r"there is no file or folder 'nowhere.jsonl'"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(streamed, changes, message):
    with pytest.raises(ValueError, match=message):
        sample_documents(streamed(**changes), seed=0)


def test_a_row_without_a_text_is_refused_and_shown(tmp_path, tokenizer):
    (tmp_path / "odd.jsonl").write_text('{"text": "fine"}\n{"text": null}\n')

    with pytest.raises(ValueError, match=r"odd\.jsonl: row 1 .* of column 'text' must be a text, got None"):
        take(StreamedRows(DataConfig(files=str(tmp_path), streaming=True), frozenset(), tokenizer, seed=0), 1)


def test_files_of_two_kinds_make_one_stream(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')

    stream = stream_texts(DataConfig(files=str(tmp_path), streaming=True), shuffle_seed=None)

    assert [row["text"] for row in stream] == ["a", "b"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.stride=4", r"`data.stride` \(4\) has no effect: a stream is cut into rows without overlap"),
        ("data.num_proc=2", r"`data.num_proc` \(2\) has no effect: a stream is tokenized as it is read"),
        ("data.num_workers=2", r"`data.num_workers` \(2\) has no effect: a stream is tokenized as it is read"),
        ("data.validation_fraction=0.2", r"`data.validation_fraction` \(0.2\) has no effect: a stream has no end"),
        ("tokenizer.name=null", r"`data.streaming` needs a tokenizer that is trained already"),
        ("train.eval_every=epoch", r"`train.eval_every` \('epoch'\) needs an end of the text"),
        ("data.shuffle_buffer=0", r"`data.shuffle_buffer` must be at least 1, got 0"),
        ("data.streaming=false", r"`data.shuffle_buffer` \(5\) has no effect: `data.streaming` is false"),
    ],
)
def test_an_option_that_fits_no_stream_is_refused(tmp_path, override, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {files: x.jsonl, streaming: true, shuffle_buffer: 5}\ntokenizer: {name: gpt2}\ntrain: {max_steps: 100}\n"
    )

    with pytest.raises(ValueError, match=message):
        load_config(recipe, [override])


def test_rows_of_a_stream_do_not_change_when_the_next_ones_are_made(streamed, tokenizer):
    rows = take(StreamedRows(streamed(), frozenset(), tokenizer, seed=0), 50)
    copies = [row["input_ids"].copy() for row in rows]

    assert all(np.array_equal(row["input_ids"], copy) for row, copy in zip(rows, copies, strict=True))
