"""The loop around the model: transformers' `generate` writes the same, whatever stands beside a row."""

import math
from copy import deepcopy

import pytest
import torch

from hfgpt.generation.decoding import generate, generate_stream, process_logits, sample_next_token
from hfgpt.generation.params import OPTIONS, SamplingParams

# The logits of the nine-word example in Raschka, "Build a Large Language Model (From Scratch)", section 5.3.
NINE_WORDS = torch.tensor([[4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])
PROMPTS = torch.randint(61, (3, 7), generator=torch.Generator().manual_seed(1))
LEFT_PADDING = (torch.arange(7) >= torch.tensor([[0], [2], [5]])).long()


def write(model, ids, **settings):
    """`generate` with the params among `settings`, which are the model's own distribution where they are not given."""
    own = {"max_new_tokens": 30, "temperature": 1.0, "top_k": 0}
    params = SamplingParams(**own | {name: value for name, value in settings.items() if name in OPTIONS})
    return generate(model, ids, params, **{name: value for name, value in settings.items() if name not in OPTIONS})


def greedy(model, ids, **settings):
    return write(model, ids, temperature=0, **settings)


def generate_with_transformers(model, ids, mask=None, **keywords):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=30, **{"pad_token_id": 0, **keywords})


def test_sampling_draws_what_the_lecture_drew():
    torch.manual_seed(123)

    ids = [sample_next_token(NINE_WORDS, SamplingParams(temperature=1.0, top_k=0)) for _ in range(1000)]

    assert torch.bincount(torch.cat(ids), minlength=9).tolist() == [73, 0, 0, 582, 2, 0, 0, 343, 0]


def test_sampling_frequencies_match_the_filtered_probabilities():
    rows = NINE_WORDS.expand(40_000, -1)

    params = SamplingParams(temperature=2.0, top_k=4, top_p=0.9)
    ids = sample_next_token(rows, params, torch.Generator().manual_seed(0))

    # By hand: of the four likeliest, 6.75, 6.28, 4.51 and 1.79, the first three have 0.96 and the first two 0.81.
    weights = torch.tensor([4.51, 6.75, 6.28]).div(2).exp()
    expected = torch.zeros(9)
    expected[[0, 3, 7]] = weights / weights.sum()
    # 5 standard deviations of a frequency of 0.5 in 40,000 draws
    torch.testing.assert_close(torch.bincount(ids, minlength=9) / 40_000, expected, rtol=0, atol=0.0125)


def test_temperature_zero_takes_the_likeliest_whatever_the_filters():
    assert sample_next_token(NINE_WORDS, SamplingParams(temperature=0, top_k=2, top_p=0.3)).tolist() == [3]


def test_half_precision_logits_are_sampled_from_in_fp32():
    logits = torch.randn(4000, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()

    half, full = (
        sample_next_token(x, SamplingParams(temperature=0.7, top_k=500, top_p=0.9), torch.Generator().manual_seed(0))
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
    ours = write(model, PROMPTS, max_new_tokens=30, **sampling)

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

    write(model, PROMPTS, max_new_tokens=4)

    assert calls == [(7, False), (1, False), (1, False), (1, False)]


def test_a_seed_fixes_the_text_and_another_seed_changes_it(model):
    default_state = torch.get_rng_state()

    first, again, other = (
        write(model, PROMPTS, max_new_tokens=20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), default_state)


def test_the_seed_of_the_params_is_that_of_a_generator(model):
    seeded = write(model, PROMPTS, seed=3)

    assert torch.equal(seeded, write(model, PROMPTS, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(seeded, write(model, PROMPTS, seed=4))


def test_generate_stream_yields_what_generate_joins(model):
    params = SamplingParams(max_new_tokens=41, temperature=0)  # fills the 48 positions

    steps = list(generate_stream(model, PROMPTS, params))

    joined = generate(model, PROMPTS, params)
    assert torch.equal(joined[:, :7], PROMPTS)
    assert torch.equal(joined[:, 7:], torch.stack(steps, dim=1))


def test_decoding_is_without_dropout_and_leaves_every_mode_as_it_was(model):
    expected = greedy(model, PROMPTS)
    model = deepcopy(model).train()
    model.transformer.h[0].eval()  # as someone who freezes a block does
    modes = [module.training for module in model.modules()]

    left_early = generate_stream(model, PROMPTS, SamplingParams(max_new_tokens=30, temperature=0))
    next(left_early)
    modes_between_steps = [module.training for module in model.modules()]
    ids = greedy(model, PROMPTS)
    with pytest.raises(IndexError):
        write(model, torch.tensor([[10_000]]), max_new_tokens=1)  # no such token: the model itself fails

    assert modes_between_steps == modes == [module.training for module in model.modules()]
    assert torch.equal(ids, expected)


def test_generated_ids_can_be_trained_on_and_gradients_stay_on_between_steps(model):
    model = deepcopy(model)
    for _ in generate_stream(model, PROMPTS, SamplingParams(max_new_tokens=2)):
        assert torch.is_grad_enabled()
    ids = write(model, PROMPTS, max_new_tokens=5)

    model(input_ids=ids, labels=ids).loss.backward()

    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ({"max_new_tokens": 42}, r"\(7 tokens\).*\(42\).*\(48\). Shorten the prompt"),
        ({"temperature": -0.5}, "`temperature` must be finite and at least 0, got -0.5"),
        ({"temperature": math.nan}, "`temperature` must be finite and at least 0, got nan"),
        ({"top_k": -1}, "`top_k` must be at least 0, got -1"),
        ({"top_p": 0.0}, "`top_p` must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "`top_p` must be above 0 and at most 1, got 1.1"),
        ({"min_p": -0.1}, "`min_p` must be at least 0 and at most 1, got -0.1"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` must be finite and above 0, got 0.0"),
        ({"no_repeat_ngram_size": -1}, "`no_repeat_ngram_size` must be at least 0, got -1"),
        ({"num_beams": 2}, r"`num_beams` \(2\) is above 1: that is what `beam_search` is for"),
        ({"stop": ("x",)}, r"`stop` \['x'\] needs a tokenizer. Use `generate_texts`, or give `is_stopped`"),
        ({"generator": [torch.Generator()]}, "`generator` has 1 entries for 3 rows"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"at least one of each, got shape \(1, 0\)"),
        ({"input_ids": torch.zeros(7, dtype=torch.long)}, r"must be \(rows, tokens\) .* got shape \(7,\)"),
        ({"attention_mask": torch.ones(3, 6)}, r"`attention_mask` has shape \(3, 6\), but `input_ids` has \(3, 7\)"),
        ({"attention_mask": torch.ones(3, 7).tril(5)}, r"ends in 0 in rows \[0\]: .* Pad on the left"),
    ],
)
def test_what_cannot_be_decoded_is_refused_before_the_first_step(model, arguments, message):
    params = {"max_new_tokens": 5, **{name: value for name, value in arguments.items() if name in OPTIONS}}
    inputs = {"input_ids": PROMPTS, **{name: value for name, value in arguments.items() if name not in OPTIONS}}

    with pytest.raises(ValueError, match=message):
        generate_stream(model, params=SamplingParams(**params), **inputs)


RULES = [
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7},
    {"no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
]


NO_TOKEN_TWICE = {"no_repeat_ngram_size": 1}  # in transformers 5.23 the ids of the padding count as well


@pytest.mark.parametrize(
    ("rules", "mask"),
    [*((rules, mask) for rules in RULES for mask in (None, LEFT_PADDING)), (NO_TOKEN_TWICE, None)],
    ids=lambda value: str(value) if isinstance(value, dict) else "full" if value is None else "left-padded",
)
def test_greedy_text_under_rules_about_earlier_tokens_equals_transformers_generate(model, rules, mask):
    ours = greedy(model, PROMPTS, attention_mask=mask, **rules)

    assert torch.equal(ours, generate_with_transformers(model, PROMPTS, mask, do_sample=False, **rules))
    assert not torch.equal(ours, greedy(model, PROMPTS, attention_mask=mask))  # the rules did something


@pytest.mark.parametrize("rules", [*RULES, NO_TOKEN_TWICE], ids=str)
def test_rules_about_earlier_tokens_do_not_see_padding(model, rules):
    prompts = PROMPTS.masked_fill(LEFT_PADDING == 0, int(greedy(model, PROMPTS)[1, 10]))  # a token that may well come

    together = greedy(model, prompts, attention_mask=LEFT_PADDING, **rules)

    for row, padding in enumerate([0, 2, 5]):
        assert torch.equal(together[row, padding:], greedy(model, prompts[row : row + 1, padding:], **rules)[0])


@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.7, "min_p": 0.1, "repetition_penalty": 1.3},
        {"top_k": 5, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_all_rules_together_sample_what_transformers_generate_samples(model, rules):
    torch.manual_seed(5)
    ours = write(model, PROMPTS, max_new_tokens=30, attention_mask=LEFT_PADDING, **rules)

    torch.manual_seed(5)
    theirs = {"top_k": 0, **rules}  # their default is 50
    assert torch.equal(ours, generate_with_transformers(model, PROMPTS, LEFT_PADDING, do_sample=True, **theirs))


def test_ids_that_no_tokenizer_knows_are_never_written(model):
    usual = greedy(model, PROMPTS)
    unknown = usual[:, 7:].unique()[:20]
    suppress_mask = torch.zeros(61, dtype=torch.bool).index_fill(0, unknown, True)

    ours = greedy(model, PROMPTS, suppress_mask=suppress_mask)

    theirs = generate_with_transformers(model, PROMPTS, do_sample=False, suppress_tokens=unknown.tolist())
    assert torch.equal(ours, theirs)
    hot = write(model, PROMPTS, max_new_tokens=40, temperature=50.0, suppress_mask=suppress_mask)[:, 7:]
    assert not torch.isin(hot, unknown).any()
    assert len(hot.unique()) > 30  # of the 41 left


def test_a_row_with_its_own_generator_writes_what_it_writes_alone(model):
    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    sampling = {"max_new_tokens": 30, "temperature": 0.9, "top_k": 30, "repetition_penalty": 1.1}
    together = write(model, PROMPTS, attention_mask=LEFT_PADDING, generator=seeded(3, 4, 5), **sampling)
    swapped = write(model, PROMPTS.flip(0), attention_mask=LEFT_PADDING.flip(0), generator=seeded(5, 4, 3), **sampling)

    assert torch.equal(together, swapped.flip(0))
    for row, padding in enumerate([0, 2, 5]):
        prompt = PROMPTS[row : row + 1, padding:]
        assert torch.equal(together[row, padding:], write(model, prompt, generator=seeded(3 + row), **sampling)[0])
        one = torch.Generator().manual_seed(3 + row)
        assert torch.equal(together[row, padding:], write(model, prompt, generator=one, **sampling)[0])


def test_rows_stop_where_they_are_told_to_and_are_filled_up(model):
    free = greedy(model, PROMPTS)[:, 7:]
    seen = []

    def is_stopped(next_ids):
        seen.append(next_ids)
        return [len(seen) >= 4, len(seen) >= 9, len(seen) >= 6]

    ours = greedy(model, PROMPTS, is_stopped=is_stopped, pad_token_id=60)[:, 7:]

    for row, length in enumerate([4, 9, 6]):
        assert torch.equal(ours[row, :length], free[row, :length])
        assert set(ours[row, length:].tolist()) <= {60}
    assert ours.shape == (3, 9)


def test_a_model_whose_logits_are_no_numbers_is_refused(model):
    broken = deepcopy(model)
    broken.lm_head.weight.data[5] = math.nan

    with pytest.raises(FloatingPointError, match=r"not numbers \(NaN\)"):
        greedy(broken, PROMPTS)


def test_a_text_that_cannot_go_on_without_repeating_says_so(model):
    suppress_mask = torch.arange(61) >= 12

    with pytest.raises(ValueError, match=r"`no_repeat_ngram_size` \(1\) leaves no token to go on with"):
        write(model, PROMPTS % 12, max_new_tokens=20, no_repeat_ngram_size=1, suppress_mask=suppress_mask)


def test_at_temperature_zero_the_distribution_is_the_likeliest_token_alone():
    shaped = process_logits(NINE_WORDS, SamplingParams(temperature=0, top_k=4))

    assert shaped.softmax(-1).tolist() == [[0, 0, 0, 1, 0, 0, 0, 0, 0]]
