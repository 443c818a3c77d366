import math
from copy import deepcopy
from operator import length_hint
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hfgpt.decoding import apply_temperature, choose_next, filter_top_k, filter_top_p, generate, stream, stream_text

# The logits of the nine-word example in Raschka, "Build a Large Language Model (From Scratch)", section 5.3.
NINE_WORDS = torch.tensor([[4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])
RANDOM_LOGITS = torch.randn(50, 100, generator=torch.Generator().manual_seed(0)) * 4
PROMPTS = torch.randint(61, (3, 7), generator=torch.Generator().manual_seed(1))
LEFT_PADDING = (torch.arange(7) >= torch.tensor([[0], [2], [5]])).long()
KOREAN = "안녕하세요, 세계! 오늘은 날씨가 참 좋네요 👩‍👩‍👧 🇰🇷 뷁."


@pytest.fixture(scope="module")
def model():
    """A GPT-2 with noise on all weights, so large that its greedy text is not one token over and over."""
    sizes: dict[str, Any] = {"vocab_size": 61, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
    # Tied embeddings would favour the token just read.
    config = GPT2Config(**sizes, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


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


def greedy(model, ids, **settings):
    return generate(model, ids, max_new_tokens=30, temperature=0, **settings)


def generate_with_transformers(model, ids, mask=None, **keywords):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=30, **{"pad_token_id": 0, **keywords})


@pytest.mark.parametrize("logits", [RANDOM_LOGITS, RANDOM_LOGITS.round()], ids=["distinct", "tied"])
@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (apply_temperature, TemperatureLogitsWarper, [0.1, 0.7, 1.0, 2.5]),
        (filter_top_k, TopKLogitsWarper, [1, 3, 50, 100, 1000]),
        (filter_top_p, TopPLogitsWarper, [1e-6, 0.1, 0.5, 0.9, 0.999]),
    ],
)
def test_logits_become_what_transformers_makes_of_them(ours, theirs, values, logits):
    before = logits.clone()
    for value in values:
        torch.testing.assert_close(ours(logits, value), theirs(value)(None, logits), rtol=0, atol=0)
    assert torch.equal(logits, before)


@settings(derandomize=True, deadline=None)
@given(logits=st.lists(st.integers(-40, 40), min_size=1, max_size=20), top_p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_that_reaches_it(logits, top_p):
    logits = torch.tensor([logits], dtype=torch.float64) / 8

    kept = filter_top_p(logits, top_p) > -math.inf

    probabilities = logits.softmax(-1)
    assert probabilities[kept].sum() >= top_p - 1e-12  # sums of at most 20 float64 numbers below 1
    assert kept.sum() == 1 or probabilities[kept].sum() - probabilities[kept].min() < top_p + 1e-12
    assert kept.all() or probabilities[kept].min() >= probabilities[~kept].max()


def test_top_k_of_three_keeps_the_three_likeliest_of_nine_words():
    filtered = filter_top_k(NINE_WORDS, 3)

    assert filtered[filtered > -math.inf].tolist() == pytest.approx([4.51, 6.75, 6.28])


def test_top_k_of_zero_and_top_p_of_one_change_nothing():
    logits = torch.tensor([[0.0, -200.0, 3.0]])  # the second has probability 0 in fp32

    assert torch.equal(filter_top_k(logits, 0), logits)
    assert torch.equal(filter_top_p(logits, 1.0), logits)


def test_the_likeliest_token_always_stays():
    filtered = filter_top_p(filter_top_k(apply_temperature(RANDOM_LOGITS, 3.0), 1), 1e-9)

    assert torch.equal(filtered.isfinite().nonzero()[:, 1], RANDOM_LOGITS.argmax(-1))


def test_sampling_draws_what_the_lecture_drew():
    torch.manual_seed(123)

    ids = [choose_next(NINE_WORDS, temperature=1.0, top_k=0, top_p=1.0, generator=None) for _ in range(1000)]

    assert torch.bincount(torch.cat(ids), minlength=9).tolist() == [73, 0, 0, 582, 2, 0, 0, 343, 0]


def test_sampling_frequencies_match_the_filtered_probabilities():
    rows = NINE_WORDS.expand(40_000, -1)

    ids = choose_next(rows, temperature=2.0, top_k=4, top_p=0.9, generator=torch.Generator().manual_seed(0))

    # By hand: of the four likeliest, 6.75, 6.28, 4.51 and 1.79, the first three have 0.96 and the first two 0.81.
    weights = torch.tensor([4.51, 6.75, 6.28]).div(2).exp()
    expected = torch.zeros(9)
    expected[[0, 3, 7]] = weights / weights.sum()
    # 5 standard deviations of a frequency of 0.5 in 40,000 draws
    torch.testing.assert_close(torch.bincount(ids, minlength=9) / 40_000, expected, rtol=0, atol=0.0125)


def test_temperature_zero_takes_the_likeliest_whatever_the_filters():
    assert choose_next(NINE_WORDS, temperature=0, top_k=2, top_p=0.3, generator=None).tolist() == [3]


def test_half_precision_logits_are_sampled_from_in_fp32():
    logits = torch.randn(4000, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()

    half, full = (
        choose_next(x, temperature=0.7, top_k=500, top_p=0.9, generator=torch.Generator().manual_seed(0))
        for x in (logits, logits.float())
    )

    assert torch.equal(half, full)


def test_greedy_text_of_these_tests_is_not_one_repeated_token(model):
    new = greedy(model, PROMPTS)[:, 7:]

    assert all(len(row.unique()) >= 8 for row in new)  # or equality with transformers' `generate` would say little


@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_equals_transformers_generate(model, rows):
    ours = greedy(model, PROMPTS[:rows])

    assert torch.equal(ours, generate_with_transformers(model, PROMPTS[:rows], do_sample=False))


def test_left_padded_rows_equal_transformers_generate_and_each_row_alone(model):
    together = greedy(model, PROMPTS, attention_mask=LEFT_PADDING)

    assert torch.equal(together, generate_with_transformers(model, PROMPTS, LEFT_PADDING, do_sample=False))
    for row, padding in enumerate([0, 2, 5]):
        alone = greedy(model, PROMPTS[row : row + 1, padding:])
        assert torch.equal(together[row, padding:], alone[0])


@pytest.mark.parametrize("pad_token_id", [None, 60])
@pytest.mark.parametrize("as_list", [False, True])
def test_rows_stop_at_their_eos_as_in_transformers_generate(model, as_list, pad_token_id):
    free = greedy(model, PROMPTS)[:, 7:].tolist()
    common = [token for token in free[0] if all(token in row for row in free)]
    eos = [common[0], free[1][3]] if as_list else common[:1]
    lengths = [min(row.index(token) for token in eos if token in row) + 1 for row in free]
    assert len(set(lengths)) > 1
    assert max(lengths) < 30
    stops = {"eos_token_id": eos if as_list else eos[0], "pad_token_id": pad_token_id}

    ours = greedy(model, PROMPTS, **stops)

    stops["pad_token_id"] = eos[0] if pad_token_id is None else pad_token_id
    assert torch.equal(ours, generate_with_transformers(model, PROMPTS, do_sample=False, **stops))
    assert ours.shape[1] == 7 + max(lengths)


def test_sampling_equals_transformers_generate(model):
    sampling = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    torch.manual_seed(5)
    ours = generate(model, PROMPTS, max_new_tokens=30, **sampling)

    torch.manual_seed(5)
    assert torch.equal(ours, generate_with_transformers(model, PROMPTS, do_sample=True, **sampling))


def test_cached_decoding_equals_decoding_without_cache(model):
    cached = greedy(model, PROMPTS)

    ids = PROMPTS
    for _ in range(30):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, ids)


def test_the_prompt_is_read_once_and_then_one_token_a_step_without_gradients(model):
    model = deepcopy(model)
    calls = []
    model.register_forward_pre_hook(
        lambda module, args, keywords: calls.append((keywords["input_ids"].shape[1], torch.is_grad_enabled())),
        with_kwargs=True,
    )

    generate(model, PROMPTS, max_new_tokens=4)

    assert calls == [(7, False), (1, False), (1, False), (1, False)]


def test_a_seed_fixes_the_text_and_another_seed_changes_it(model):
    default_state = torch.get_rng_state()

    first, again, other = (
        generate(model, PROMPTS, max_new_tokens=20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), default_state)


def test_stream_yields_what_generate_joins(model):
    steps = list(stream(model, PROMPTS, max_new_tokens=41, temperature=0))  # fills the 48 positions

    joined = generate(model, PROMPTS, max_new_tokens=41, temperature=0)
    assert torch.equal(joined[:, :7], PROMPTS)
    assert torch.equal(joined[:, 7:], torch.stack(steps, dim=1))


def test_decoding_is_without_dropout_and_leaves_every_mode_as_it_was(model):
    expected = greedy(model, PROMPTS)
    model = deepcopy(model).train()
    model.transformer.h[0].eval()  # as someone who freezes a block does
    modes = [module.training for module in model.modules()]

    left_early = stream(model, PROMPTS, max_new_tokens=30, temperature=0)
    next(left_early)
    modes_between_steps = [module.training for module in model.modules()]
    ids = greedy(model, PROMPTS)
    with pytest.raises(IndexError):
        generate(model, torch.tensor([[10_000]]), max_new_tokens=1)  # no such token: the model itself fails

    assert modes_between_steps == modes == [module.training for module in model.modules()]
    assert torch.equal(ids, expected)


def test_generated_ids_can_be_trained_on_and_gradients_stay_on_between_steps(model):
    model = deepcopy(model)
    for _ in stream(model, PROMPTS, max_new_tokens=2):
        assert torch.is_grad_enabled()
    ids = generate(model, PROMPTS, max_new_tokens=5)

    model(input_ids=ids, labels=ids).loss.backward()

    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ({"max_new_tokens": 42}, r"\(7 tokens\).*\(42\).*\(48\). Shorten the prompt"),
        ({"temperature": -0.5}, "`temperature` must be a finite number of at least 0, got -0.5"),
        ({"temperature": math.nan}, "`temperature` must be a finite number of at least 0, got nan"),
        ({"top_k": -1}, "`top_k` must be at least 0, got -1"),
        ({"top_p": 0.0}, "`top_p` must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "`top_p` must be above 0 and at most 1, got 1.1"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"at least one of each, got shape \(1, 0\)"),
        ({"input_ids": torch.zeros(7, dtype=torch.long)}, r"must be \(rows, tokens\) .* got shape \(7,\)"),
        ({"attention_mask": torch.ones(3, 6)}, r"`attention_mask` has shape \(3, 6\), but `input_ids` has \(3, 7\)"),
        ({"attention_mask": torch.ones(3, 7).tril(5)}, r"ends in 0 in rows \[0\]: .* Pad on the left"),
    ],
)
def test_what_cannot_be_decoded_is_refused_before_the_first_step(model, arguments, message):
    arguments = {"input_ids": PROMPTS, "max_new_tokens": 5, **arguments}

    with pytest.raises(ValueError, match=message):
        stream(model, **arguments)


@pytest.mark.parametrize(
    ("function", "value"), [(apply_temperature, 0), (apply_temperature, -1), (filter_top_k, -2), (filter_top_p, -1)]
)
def test_each_function_refuses_what_its_setting_cannot_be(function, value):
    with pytest.raises(ValueError, match=rf"{value}\b"):
        function(NINE_WORDS, value)


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


def test_what_stream_yields_for_one_prompt_becomes_text(model, byte_level):
    text = "".join(stream_text(byte_level, stream(model, PROMPTS[:1], max_new_tokens=30, temperature=0)))

    ids = greedy(model, PROMPTS[:1])[0, 7:]
    assert text == whole_text(byte_level, ids)
