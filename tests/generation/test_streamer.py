"""Ids become whole characters as they come, and never more than up to a stop text."""

from operator import length_hint

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hfgpt.generation.decoding import generate, generate_stream
from hfgpt.generation.params import SamplingParams
from hfgpt.generation.streamer import StoppingText, stream_text

KOREAN = "안녕하세요, 세계! 오늘은 날씨가 참 좋네요 👩‍👩‍👧 🇰🇷 뷁."


@pytest.fixture(scope="module")
def byte_level():
    """A small byte-level BPE, trained on English, so that each Korean character is three tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the lamp on the table and the moth at the lamp"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def sentencepiece():
    """A BPE as Llama has it: words start with U+2581, and what is not in the vocabulary is spelt in bytes."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", *"abcdef"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def whole_text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_korean_text_streams_whole_characters_each_with_the_token_that_completes_it(byte_level):
    ids = byte_level(KOREAN).input_ids
    remaining = iter(ids)
    pieces = []

    for piece in stream_text(byte_level, remaining):
        pieces.append(piece)
        taken = len(ids) - length_hint(remaining)
        assert whole_text(byte_level, ids[:taken]) == "".join(pieces)

    assert pieces == list(KOREAN)
    assert len(ids) > 2 * len(pieces)  # the characters are indeed split


def test_words_keep_their_spaces_with_a_sentencepiece_tokenizer(sentencepiece):
    text = "a abc  a   한글 👩‍👩‍👧 deaf"
    ids = sentencepiece(text).input_ids

    pieces = list(stream_text(sentencepiece, ids))

    assert "".join(pieces) == whole_text(sentencepiece, ids) == text
    assert "한" in pieces


def test_text_that_never_becomes_whole_is_not_held_back_for_ever(byte_level):
    continuation_byte = byte_level("한").input_ids[1]

    first = next(stream_text(byte_level, [continuation_byte] * 1000))
    assert len(first) < 20
    for broken in range(40):
        ids = [continuation_byte] * broken + byte_level("👩").input_ids
        assert "".join(stream_text(byte_level, ids)) == "\ufffd" * broken + "👩"


def test_special_tokens_and_unknown_ids_have_no_text_even_inside_a_character(byte_level):
    first, *others = byte_level("한").input_ids
    nothing = [byte_level.eos_token_id, 1_000_000] * 40

    assert list(stream_text(byte_level, [*nothing, first, *nothing, *others, *nothing])) == ["한"]


@pytest.mark.parametrize("text", ["the lamp on " * 300, "한국어 " * 300, "\ufffd" * 500], ids=["en", "ko", "broken"])
def test_streaming_takes_time_linear_in_the_number_of_tokens(byte_level, text):
    ids = byte_level(text).input_ids + [byte_level.eos_token_id] * 1000
    lengths = []

    class CountingTokenizer:
        def decode(self, token_ids, **keywords):
            lengths.append(len(token_ids))
            return byte_level.decode(token_ids, **keywords)

    assert "".join(stream_text(CountingTokenizer(), ids)) == text
    assert max(lengths) < 20
    assert len(lengths) <= 3 * len(ids) + 1


@settings(derandomize=True, deadline=None, max_examples=300)
@given(data=st.data())
def test_pieces_join_to_the_decoded_text_whatever_the_ids(byte_level, data):
    # U+FFFD itself and the parts of characters of two, three and four bytes are what can go wrong: draw them often.
    parts = st.sampled_from(byte_level("\ufffdé한👩").input_ids)
    ids = data.draw(st.lists(st.integers(0, len(byte_level)) | parts, max_size=120))

    pieces = list(stream_text(byte_level, ids))

    assert "".join(pieces) == whole_text(byte_level, ids)
    assert all(pieces)


def test_what_stream_yields_for_one_prompt_becomes_text(model, byte_level, prompts):
    params = SamplingParams(max_new_tokens=30, temperature=0)

    text = "".join(stream_text(byte_level, generate_stream(model, prompts[:1], params)))

    ids = generate(model, prompts[:1], params)[0, 7:]
    assert text == whole_text(byte_level, ids)


def push_all(tokenizer, text, stops):
    """Push the ids of a text; returns the pieces, and after how many ids it stopped, or None."""
    stopping = StoppingText(tokenizer, stops)
    pieces, stopped_after = [], None
    for count, token_id in enumerate(tokenizer(text).input_ids, start=1):
        pieces.append(stopping.push(token_id))
        if stopping.has_stopped and stopped_after is None:
            stopped_after = count
    return [*pieces, stopping.finish()], stopped_after


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    text=st.text("ab한\n", max_size=30),
    stops=st.lists(st.text("ab한\n", min_size=1, max_size=4), max_size=3),
)
def test_a_text_ends_before_the_first_stop_and_shows_no_part_of_it(byte_level, text, stops):
    pieces, stopped_after = push_all(byte_level, text, stops)

    # By brute force: the first token with which the text so far has a stop text in it.
    ids = byte_level(text).input_ids
    so_far = [whole_text(byte_level, ids[:count]).rstrip("\ufffd") for count in range(1, len(ids) + 1)]
    expected = next((count for count, each in enumerate(so_far, 1) if any(stop in each for stop in stops)), None)
    starts = [] if expected is None else [so_far[expected - 1].find(stop) for stop in stops]
    end = min((start for start in starts if start >= 0), default=len(text))
    assert stopped_after == expected
    assert "".join(pieces) == text[:end]


def test_only_what_may_become_a_stop_is_held_back(byte_level):
    pieces, _ = push_all(byte_level, "X한국X한국어.", ["한국어"])

    assert [piece for piece in pieces if piece] == ["X", "한국X"]


def test_without_a_stop_nothing_is_held_back(byte_level):
    pieces, stopped_after = push_all(byte_level, KOREAN, [])

    assert [piece for piece in pieces if piece] == list(stream_text(byte_level, byte_level(KOREAN).input_ids))
    assert stopped_after is None
