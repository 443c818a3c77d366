"""Which ids a text can become, which rows a model needs for them, and how much of a text they say."""

import numpy as np
import odd_tokenizers as odd
import pytest
from tokenizers import pre_tokenizers
from tokenizers.processors import TemplateProcessing

from hfgpt.data.tokenizer import (
    bytes_of_ids,
    count_rows,
    encode_arrays,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from hfgpt.data.vocabulary import check_rows, cover, describe_unknown, ids_of_text, unknown_ids

ODD = {
    "from 1": odd.renumbered(lambda number: number + 1),
    "gaps": odd.renumbered(lambda number: 2 * number),
    "pad on the last row": odd.pad_on_the_last_row(),
    "pad added": odd.with_pad(),
    "word added": odd.with_added("<user>", is_special=False),
    "special word added": odd.with_added("<user>", is_special=True),
}


@pytest.mark.parametrize(
    ("name", "rows", "count", "largest"),
    [
        ("from 1", 291, 289, 290),
        ("gaps", 579, 289, 578),
        ("pad on the last row", 320, 289, 289),
        ("pad added", 291, 289, 289),
        ("word added", 291, 290, 290),
        ("special word added", 291, 289, 289),
    ],
)
def test_ids_with_gaps_and_with_additions_are_counted_as_what_they_are(name, rows, count, largest):
    tokenizer = ODD[name]

    assert count_rows(tokenizer) == rows
    assert len(ids_of_text(tokenizer)) == count
    assert max(ids_of_text(tokenizer)) == largest
    text = odd.TEXT + "".join(tokenizer.get_added_vocab()) + "한국어 \0"
    assert set(encode_arrays(tokenizer, [text])[0].tolist()) <= ids_of_text(tokenizer)


def test_a_token_that_the_tokenizer_puts_before_every_text_is_one_of_a_text():
    tokenizer = odd.with_added("<s>", is_special=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 290)])

    assert 290 in ids_of_text(tokenizer)


def test_a_special_word_that_a_text_can_be_is_one_of_a_text():
    by_space = odd.words(["the", "dog"], split=pre_tokenizers.WhitespaceSplit)
    by_letters = odd.words(["the", "dog"], split=pre_tokenizers.Whitespace)

    assert by_space.eos_token_id in ids_of_text(by_space)
    assert by_letters.eos_token_id not in ids_of_text(by_letters)


@pytest.mark.parametrize("name", ["pad added", "special word added", "pad on the last row"])
def test_an_id_that_no_text_becomes_needs_no_row(name):
    check_rows(ODD[name], ids_of_text(ODD[name]), 290, "the tokenizer")


def test_an_id_that_a_text_becomes_needs_a_row_and_the_advice_applies():
    tokenizer = ODD["word added"]

    with pytest.raises(
        ValueError, match=r"^mine makes the id 290, the model's `vocab_size` is 290\. '<user>' was added"
    ):
        check_rows(tokenizer, ids_of_text(tokenizer), 290, "mine")
    with pytest.raises(ValueError, match=r"transformers' `model\.resize_token_embeddings\(291\)`"):
        check_rows(tokenizer, ids_of_text(tokenizer), 290, "mine")
    with pytest.raises(ValueError, match=r"is 100\. They do not belong together: take the model's own tokenizer\.$"):
        check_rows(tokenizer, ids_of_text(tokenizer), 100, "mine")


@pytest.mark.parametrize("name", ODD)
def test_bytes_of_ids_add_up_to_the_text_whatever_the_ids_are(name):
    ids = encode_arrays(ODD[name], [odd.TEXT])[0]
    lengths = bytes_of_ids(ODD[name])

    assert lengths[ids].sum() == len(odd.TEXT.encode())
    assert len(lengths) == count_rows(ODD[name])
    assert not lengths[ODD[name].all_special_ids].any()


def of(tokenizer, *texts):
    return cover(tokenizer, texts, encode_arrays(tokenizer, list(texts)))


@pytest.mark.parametrize(
    ("tokenizer", "text", "share", "lost"),
    [
        (odd.wrap(odd.byte_level()), "The fox. 한국어 \0\r\n <|endoftext|>", 0, None),
        (odd.words(["the", "dog"]), "the dog", 0, None),
        (odd.words(["the", "dog"]), "the cat the dog", 0.25, "1 unknown tokens"),
        (odd.words(["the", "dog"], unk=odd.END), "the cat", 0.5, "1 unknown tokens"),
        (odd.words(["the", "dog"]), "the  dog\n", 0, r"'the  dog\n' comes back as 'the dog'"),
        (odd.lowering(), "the dog", 0, None),
        (odd.lowering(), "The dog", 0, "'The dog' comes back as 'the dog'"),
        (odd.dropping(), "the한국", 2 / 3, "2 characters left out"),
        (odd.characters(), "The dog sleeps.\n", 0, None),
        (odd.pieces(), "The dog", 0, None),
        (odd.pieces(), "The 개", 1 / 6, "1 unknown tokens"),
        (odd.pieces(byte_fallback=True), "The 개", 0, None),
        (odd.wrap(odd.byte_level()), "", 0, None),
    ],
)
def test_unknown_tokens_are_counted_and_what_does_not_come_back_is_said(tokenizer, text, share, lost):
    found = of(tokenizer, text)

    assert found.unknown_share == pytest.approx(share)
    assert found.loss_of_text == lost
    assert ("says little" in describe_unknown(share)) == (share > 0.1)


def test_an_unk_token_that_the_tokenizer_never_makes_is_not_counted():
    trained = train_tokenizer([odd.TEXT], 280, 64)
    assert trained.unk_token_id == trained.eos_token_id

    assert unknown_ids(trained) == []
    assert of(trained, odd.TEXT).unknown == 0


def test_the_share_is_that_of_all_texts_together():
    found = of(odd.words(["the"]), "the the the", "cat", "")

    assert (found.tokens, found.unknown) == (4, 1)


def test_a_saved_tokenizer_names_a_pad_token_and_has_no_new_id(tmp_path):
    for name, (tokenizer, rows, pad) in {
        "none": (odd.wrap(odd.byte_level()), 290, odd.END),
        "own": (odd.pad_on_the_last_row(), 320, "<pad>"),
        "without a row": (odd.with_pad(), 290, odd.END),
        "no end": (odd.characters(), 50, None),
    }.items():
        vocabulary, text = tokenizer.get_vocab(), tokenizer("The dog")["input_ids"]

        save_tokenizer(tokenizer, tmp_path / name, rows)

        loaded = load_tokenizer(str(tmp_path / name))
        assert loaded.pad_token == pad
        assert (loaded.get_vocab(), loaded("The dog")["input_ids"]) == (vocabulary, text)
        if pad is not None:
            batch = loaded(["The", "The dog"], padding=True)
            assert np.array(batch["input_ids"]).max() < rows
