import json

import huggingface_hub.constants
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_tokenizers import characters, pieces, words
from tokenizers import Tokenizer
from tokenizers.implementations import ByteLevelBPETokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

import hfgpt.data.tokenizer
from hfgpt.data.tokenizer import check_end_of_text, encode_ids, load_tokenizer, tokenizer_hash, train_tokenizer

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 3, "def f(x):\n    return x + 1\n", "여우가 개를 넘는다."]
ODD = "a\r\nb\rc\n\0\ufeff  e\u0301 \U0001f600 한국어 <|endoftext|> \u2028end "


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=320, model_max_length=64)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


def decode(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@settings(deadline=None, max_examples=100)
@given(st.text())
def test_every_text_comes_back_from_its_ids(tokenizer, text):
    assert decode(tokenizer, encode_ids(tokenizer, [text])[0]) == text


@pytest.mark.parametrize("text", [ODD, "안녕하세요, 세계!", "<|endoftext|>", ""])
def test_odd_texts_come_back_from_their_ids(tokenizer, text):
    assert decode(tokenizer, encode_ids(tokenizer, [text])[0]) == text


def test_the_vocabulary_is_the_one_that_the_tokenizers_library_trains(tokenizer):
    reference = ByteLevelBPETokenizer()
    reference.train_from_iterator(TEXTS, 320, min_frequency=0, show_progress=False, special_tokens=["<|endoftext|>"])

    assert tokenizer.get_vocab() == reference.get_vocab()
    assert encode_ids(tokenizer, TEXTS) == [encoding.ids for encoding in reference.encode_batch(TEXTS)]


def test_the_end_of_text_is_one_of_the_ids_and_bos_eos_and_unk(tokenizer):
    assert len(tokenizer) == 320
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.unk_token == "<|endoftext|>"
    assert 0 <= tokenizer.eos_token_id < 320
    assert (tokenizer.model_max_length, tokenizer.clean_up_tokenization_spaces) == (64, False)


def test_the_same_text_gives_the_same_tokenizer(tokenizer):
    again = train_tokenizer(iter(TEXTS), vocab_size=320, model_max_length=64)

    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_too_small_a_text_gives_a_smaller_tokenizer():
    assert len(train_tokenizer(["abab"], vocab_size=5000, model_max_length=8)) == 257 + 2  # ab, abab


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match=r"at least 257 .* got 256"):
        train_tokenizer(TEXTS, vocab_size=256, model_max_length=8)


def test_a_literal_end_of_text_is_text_also_after_saving_and_loading(tokenizer, folder):
    for loaded in [tokenizer, load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)]:
        ids = encode_ids(loaded, ["a<|endoftext|>b"])[0]

        assert loaded.eos_token_id not in ids
        assert decode(loaded, ids) == "a<|endoftext|>b"
        assert loaded("<|endoftext|>")["input_ids"] == [loaded.eos_token_id]  # as prompts may use it


def test_saved_and_loaded_is_the_same_tokenizer(tokenizer, folder):
    loaded = load_tokenizer(str(folder))

    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert encode_ids(loaded, [ODD, *TEXTS]) == encode_ids(tokenizer, [ODD, *TEXTS])
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.model_max_length == tokenizer.model_max_length


def test_the_hash_tells_tokenizers_apart_and_nothing_else(tokenizer, folder):
    loaded = load_tokenizer(str(folder))
    loaded.pad_token = loaded.eos_token
    loaded(["a", "a b c"], padding=True, truncation=True, max_length=2)  # leaves padding and truncation behind

    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    assert tokenizer_hash(train_tokenizer(TEXTS, 310, 64)) != tokenizer_hash(tokenizer)


def test_no_texts_have_no_ids(tokenizer):
    assert encode_ids(tokenizer, []) == []
    assert encode_ids(tokenizer, ["", "a", ""]) == [[], tokenizer("a")["input_ids"], []]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.sampled_from("ab1.'\u00a0 \n\r\t한s"), max_size=150), max_size=4))
def test_long_texts_get_the_ids_that_they_have_in_one_piece(tokenizer, texts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hfgpt.data.tokenizer, "PIECE", 8)
        patch.setattr(hfgpt.data.tokenizer, "CALL", 20)
        ids = encode_ids(tokenizer, texts)

    assert ids == [tokenizer(text, split_special_tokens=True)["input_ids"] for text in texts]


def test_a_text_is_not_cut_where_that_would_change_its_ids(tokenizer, monkeypatch):
    monkeypatch.setattr(hfgpt.data.tokenizer, "PIECE", 8)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=True)  # a piece that starts with "\n" would get a space in front
    adding_spaces = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = " The fox\njumps over\nthe\nlazy\ndog" * 3

    assert encode_ids(adding_spaces, [text]) == [adding_spaces(text)["input_ids"]]


def test_training_in_pieces_gives_the_same_tokenizer(tokenizer, monkeypatch):
    monkeypatch.setattr(hfgpt.data.tokenizer, "PIECE", 8)

    again = train_tokenizer(TEXTS, vocab_size=320, model_max_length=64)

    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_long_text_is_cut_where_it_may_be_and_left_whole_where_not():
    text = "word " * 30_000

    exact = list(hfgpt.data.tokenizer.cut(text, lambda left, right: True))
    never = list(hfgpt.data.tokenizer.cut(text, lambda left, right: False))

    assert [len(piece) for piece in exact] == [50_004, 50_000, 49_996]
    assert "".join(exact) == text
    assert never == [text]


def test_folders_without_a_tokenizer_are_refused_in_one_line(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:500])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text("{}")

    for name in ["empty", "model", "broken", "other"]:
        with pytest.raises(ValueError, match="no tokenizer") as refusal:
            load_tokenizer(str(tmp_path / name))
        assert str(tmp_path / name) in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_a_hub_id_that_cannot_be_reached_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(ValueError, match=r"no tokenizer 'nobody/nothing', neither as a folder nor on the Hub: [^\n]+$"):
        load_tokenizer("nobody/nothing")


def test_a_tokenizer_without_an_eos_token_is_refused_where_one_is_needed(tmp_path, folder):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))

    tokenizer = load_tokenizer(str(tmp_path))

    with pytest.raises(ValueError, match="'mine' has no eos token, which goes between documents"):
        check_end_of_text(tokenizer, "mine", "which goes between documents.")


def test_a_tokenizer_without_tokenizer_json_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"is a ByT5Tokenizer, without a tokenizer\.json"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("named", "expected"),
    [(1, "</s>"), ([0, 1], "<unk>"), (50256, None), (2, None), (None, None), (-1, None)],
)
def test_the_end_of_text_is_the_config_s_where_the_tokenizer_names_none(tmp_path, file, named, expected):
    pieces().save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps({"model_type": "gpt2", "eos_token_id": named}))

    tokenizer = load_tokenizer(str(tmp_path))

    assert tokenizer.eos_token == expected  # 2 is the letter "▁": an ordinary token ends nothing
    assert len(tokenizer) == len(pieces())
    tokenizer.save_pretrained(tmp_path / "saved")
    assert tokenizer_hash(load_tokenizer(str(tmp_path / "saved"))) == tokenizer_hash(tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "text", "unknown"),
    [
        (characters(), "The dogé", r"'é' \(U\+00E9\)"),
        (characters(), "x" * 70_000 + "\u3000", r"'\\u3000' \(U\+3000\)"),
        (words(["the"], unk=None), "the catfish", "'catfish'"),
        (words(["the"], unk=None), "the " + "c" * 3000, r"'c{99}… \(3,002 characters\)"),
        (pieces(unk=False), "The 개 dog", r"'개' \(U\+AC1C\)"),
    ],
)
def test_what_a_tokenizer_does_not_know_is_named_in_one_line(tokenizer, text, unknown):
    with pytest.raises(ValueError, match=f"the tokenizer does not know {unknown}, and has no token") as refusal:
        encode_ids(tokenizer, ["The" if tokenizer.vocab_size > 10 else "the", text])
    assert "\n" not in str(refusal.value)
