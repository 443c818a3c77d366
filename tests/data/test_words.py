"""Text is tokenized word by word where that gives the tokenizer's own ids, and nowhere else."""

import json
import pickle
import re
import unicodedata

import datasets
import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_tokenizers import TEXT, byte_level, characters, pieces, with_added, with_pad, words, wrap
from small_rows import ids_of
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

import hfgpt.data.words
from hfgpt.config.schema import DataConfig
from hfgpt.data.prepare import load_rows
from hfgpt.data.text import Documents
from hfgpt.data.tokenizer import WORD_END, encode_arrays, train_tokenizer
from hfgpt.data.words import ASCII_WORD, WORD, WordEncoder, encode_by_words, is_cut_alike, is_cut_by_words

PARTS = [
    *("a", "It's", "I'LL 'tis ''re", " word", "DON'T", "12 3456", " ...", "?!x", "\t", "\r\n", "\n\n  ", "   ", "\x1c"),
    *(
        "\x85",
        "\xa0",
        "\u2028x",
        "\u3000",
        "\0",
        "\x7f",
        "\ufeff",
        "e\u0301",
        "²½Ⅷ",
        "안녕하세요, 세계! ",
        "\u017f'\u017f",
    ),
    *("\U0001f600\u200d", "ǅ", "<|endoftext|>", "<|endoftext|> <|endoftext|>", "x" * 300, "é" * 90, " " * 70, "٣٤"),
    *("\U000e0001", "日本語\u3000テキスト"),
]
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(max_size=12), max_size=12).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT, *PARTS * 3], vocab_size=600, model_max_length=64)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return WordEncoder(tokenizer)


def same(encoded, expected):
    assert [each.tolist() for each in encoded] == [each.tolist() for each in expected]
    assert {each.dtype for each in encoded} <= {np.dtype(np.int32)}


def test_another_process_gets_the_tokenizer_once_and_gives_the_same_ids(tokenizer):
    texts = [TEXT, *PARTS]
    encoder = WordEncoder(tokenizer)
    expected = encoder.encode(texts)

    sent = pickle.dumps(encoder)

    assert len(sent) < len(pickle.dumps(tokenizer)) + 1000
    same(pickle.loads(sent).encode(texts), expected)


@settings(deadline=None, max_examples=200)
@given(st.lists(TEXTS, max_size=4))
def test_words_have_the_ids_of_their_text(encoder, texts):
    assert encoder.is_cut_by_words

    same(encoder.encode(texts), encode_arrays(encoder.tokenizer, texts))


def unordered():
    """Merges whose results are no longer numbered as they come, and one token that two merges could make."""
    state = json.loads(byte_level().to_str())
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    for one, other in zip(sorted(vocab), sorted(vocab, reverse=True), strict=True):
        if len(one) > 1 and len(other) > 1 and "<" not in one + other:
            vocab[one], vocab[other] = vocab[other], vocab[one]
    merges.insert(0, ["o", "w"])
    vocab["ow"] = vocab.get("ow", len(vocab))
    return Tokenizer.from_str(json.dumps(state))


@settings(deadline=None, max_examples=50)
@given(st.lists(TEXTS | st.text("the quickbrown ", max_size=30), max_size=4))
def test_a_tokenizer_whose_merges_are_out_of_order_is_no_other_case(texts):
    encoder = WordEncoder(wrap(unordered()))

    assert encoder.is_cut_by_words
    same(encoder.encode(texts), encode_arrays(encoder.tokenizer, texts))


@pytest.mark.parametrize(
    "tokenizer",
    [
        wrap(byte_level(normalizer=normalizers.NFC())),
        wrap(byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))),
        wrap(byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))),
        wrap(byte_level(model=models.BPE(dropout=0.5, **{"vocab": {"a": 0}, "merges": []}))),
        wrap(byte_level(model=models.BPE(vocab={"a": 0, "<|endoftext|>": 1}, merges=[]))),
        words(["The", "quick", "fox"]),
        characters(),
        pieces(),
    ],
    ids=["normalizer", "prefix space", "other pattern", "dropout", "not all bytes", "words", "characters", "unigram"],
)
def test_a_tokenizer_of_another_kind_reads_each_text_in_one_piece(tokenizer):
    texts = ["The quick fox. ", "e", ""]

    assert not is_cut_by_words(tokenizer)
    if getattr(tokenizer.backend_tokenizer.model, "dropout", None) is None:
        same(encode_by_words(tokenizer, texts), encode_arrays(tokenizer, texts))


@pytest.mark.parametrize("splits", [True, False])
@pytest.mark.parametrize("make", [with_pad, lambda: with_added("brown fox", False), lambda: with_added("<x>", True)])
def test_added_tokens_are_found_as_the_tokenizer_finds_them(make, splits):
    tokenizer = make()
    texts = ["The brown fox <pad> <x>", "The brown  fox", "fox", "a<|endoftext|>b"]

    same(encode_by_words(tokenizer, texts, splits), encode_arrays(tokenizer, texts, splits))


def test_a_saved_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)

    loaded = AutoTokenizer.from_pretrained(tmp_path)

    assert is_cut_by_words(loaded)
    same(encode_by_words(loaded, PARTS), encode_arrays(tokenizer, PARTS))


def test_a_long_text_and_its_longest_words_have_their_ids(encoder):
    texts = ["one two  three\n" * 9000, "word" * 20_000 + " " + "x " * 40_000, "가나다 " * 30_000]

    same(encoder.encode(texts), encode_arrays(encoder.tokenizer, texts))


def test_half_a_character_is_what_it_is_to_the_tokenizer(encoder):
    for encode in (encoder.encode, lambda texts: encode_arrays(encoder.tokenizer, texts)):
        with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
            encode(["fine", "\ud800"])


def test_the_patterns_cut_characters_as_the_tokenizer_does():
    assert all(is_cut_alike(chr(code), ASCII_WORD) for code in range(0x80))
    known = [chr(code) for code in range(0x3200) if unicodedata.category(chr(code)) != "Cn"]  # to Python's table, too
    assert all(is_cut_alike(character, WORD) for character in known)


def test_a_long_text_is_cut_before_what_the_tokenizer_also_takes_for_white_space():
    spaces = regex.findall(r"\s", "".join(map(chr, range(0x10000))))

    assert all(re.fullmatch(r"\s", space) for space in spaces)
    assert not any(WORD_END.search(f"{space} ") for space in spaces)


def test_a_character_of_which_the_tables_differ_keeps_its_text_in_one_piece(tokenizer, monkeypatch):
    monkeypatch.setattr(hfgpt.data.words, "WORD", regex.compile(WORD.pattern.replace(r"\p{L}", r"\p{L}½")))
    encoder, texts = WordEncoder(tokenizer), ["It is 1½x", "It is é"]

    encoded = encoder.encode(texts)

    assert encoder.strange == {"½"}
    same(encoded, encode_arrays(tokenizer, texts))


def test_only_so_many_words_are_remembered(tokenizer, monkeypatch):
    monkeypatch.setattr(hfgpt.data.words, "REMEMBERED", 5)
    encoder, texts = WordEncoder(tokenizer), [TEXT, " ".join(map(str, range(50))), "y" * 101]

    encoded = encoder.encode(texts)

    assert len(encoder.ids_of_word) <= 5
    assert not any(len(word) > 100 for word in encoder.ids_of_word)
    same(encoded, encode_arrays(tokenizer, texts))


@pytest.mark.parametrize("processes", [1, 2])
def test_where_a_check_fails_all_is_tokenized_again_in_one_piece(tokenizer, tmp_path, monkeypatch, capsys, processes):
    monkeypatch.setattr(hfgpt.data.words, "ASCII_WORD", re.compile(r"\S+|\s"))
    monkeypatch.setattr(hfgpt.data.words, "CHECK_EVERY", 3)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    texts = ["한국어", *["The quick fox"] * 10]
    documents = Documents(*(datasets.Dataset.from_dict({"text": texts}) for _ in range(2)))

    rows = load_rows(documents, tokenizer, DataConfig(block_size=8, num_proc=processes))

    said = capsys.readouterr().err
    assert said.count("other ids in one piece than word by word. Tokenizing again, each text in one piece.") == 2
    expected = np.concatenate([[tokenizer.eos_token_id, *ids] for ids in encode_arrays(tokenizer, texts)])[1:]
    assert [id for row in ids_of(rows.train) for id in row[:-1]] == expected[: len(rows.train) * 8].tolist()
