"""From text to rows: nothing is lost, and what is there already is not made again."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_tokenizers import END, characters, words
from small_rows import ids_of

import hfgpt.data.prepare
from hfgpt.config.schema import DataConfig
from hfgpt.data.prepare import load_rows
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


def tokens_of(rows, stride):
    """The ids that overlapping rows were cut from, each of its ids once."""
    ids = np.array(ids_of(rows))
    return [*ids[:, :stride].reshape(-1).tolist(), *ids[-1, stride:].tolist()]


def decode_tokens(tokenizer, tokens):
    ends = [i for i, token in enumerate(tokens) if token == tokenizer.eos_token_id]
    parts = [tokens[start:end] for start, end in zip([0, *(i + 1 for i in ends)], [*ends, None], strict=True)]
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
    tokens = tokens_of(whole, 1)
    assert decode_tokens(tokenizer, tokens) == texts

    if len(tokens) > block_size:
        rows = load_rows(documents, tokenizer, DataConfig(block_size=block_size, stride=stride))
        remainder = rows.train_counts.remainder
        assert tokens_of(rows.train, stride) == tokens[: len(tokens) - remainder]
        assert remainder < stride
        assert rows.train_counts.tokens == len(tokens)


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


def test_many_documents_make_one_array(tokenizer):
    texts = [f"{i}" for i in range(1000)]

    rows = load_rows(as_documents(texts, TEXTS), tokenizer, DataConfig(block_size=1)).train

    assert decode_tokens(tokenizer, tokens_of(rows, 1)) == texts


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_rows_start_every_stride_tokens(tokenizer, stride):
    tokens = tokens_of(load_rows(as_documents(TEXTS, TEXTS), tokenizer, DataConfig(block_size=1)).train, 1)

    rows = load_rows(as_documents(TEXTS, TEXTS), tokenizer, DataConfig(block_size=8, stride=stride)).train

    assert ids_of(rows) == [tokens[i : i + 9] for i in range(0, len(tokens) - 8, stride)]


def test_every_number_of_tokenizing_processes_gives_the_same_rows(tokenizer, tmp_path, monkeypatch):
    # datasets (5.2) puts a copy in the place of `os.environ`, and rich would go on reading the old one in later tests.
    monkeypatch.setattr(os, "environ", os.environ)
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


def is_view_of(part, whole):
    return np.shares_memory(part, whole)


def test_rows_are_views_of_the_file_and_copy_nothing(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox " * 5000)
    data = DataConfig(files=str(tmp_path), block_size=64)

    rows = load_rows(load_documents(data, seed=0), tokenizer, data).train

    [part] = rows.tokens.parts
    assert not part.flags.writeable
    assert all(is_view_of(rows[index]["input_ids"], part) for index in range(len(rows)))


def test_unknown_tokens_are_counted_in_the_whole_of_each_split_and_separators_are_none(monkeypatch):
    monkeypatch.setattr(hfgpt.data.prepare, "SAMPLE", 5)
    texts = ["the dog", "the cat and the dog", "the the"]
    for unk in ("[UNK]", END):
        documents = as_documents(texts, ["the dog", "the dog"])
        rows = load_rows(documents, words(["the", "dog"], unk), DataConfig(block_size=2))

        assert rows.train_counts.unknown_share == pytest.approx(2 / 9)
        assert rows.train_counts.loss_of_text == "2 unknown tokens"
        assert (rows.validation_counts.unknown_share, rows.validation_counts.loss_of_text) == (0, None)


@pytest.mark.parametrize("stride", [3, 2])
def test_without_a_separator_a_split_is_its_documents_one_after_another(stride):
    tokenizer = characters("".join(TEXTS))

    rows = load_rows(
        as_documents(TEXTS, TEXTS[:2]), tokenizer, DataConfig(block_size=3, stride=stride, separator=None)
    ).train

    text = "".join(TEXTS)
    assert text.startswith(tokenizer.decode(tokens_of(rows, stride)))
    assert len(text) - len(tokens_of(rows, stride)) < stride
