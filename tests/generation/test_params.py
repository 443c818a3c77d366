"""Settings as people write them: read, checked, and refused where they would do nothing."""

import math

import pytest

from hfgpt.generation.params import (
    DEFAULTS,
    OPTIONS,
    SamplingParams,
    change_params,
    format_value,
    make_variants,
    parse_params,
    parse_value,
)


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("temperature=0.8,top_k=50", {"temperature": 0.8, "top_k": 50}),
        ("top-k=3, min-p = 0.1".replace(" = ", "="), {"top_k": 3, "min_p": 0.1}),
        ("num_beams=4,early_stopping=Never", {"num_beams": 4, "early_stopping": "never"}),
        ("early_stopping=true,length_penalty=-1", {"early_stopping": True, "length_penalty": -1.0}),
        ("stop=one, two,stop=\\n,seed=7", {"stop": ("one, two", "\n"), "seed": 7}),
        ("seed=none,stop=a=b", {"seed": None, "stop": ("a=b",)}),
        ("stop= ", {"stop": (" ",)}),
    ],
)
def test_settings_are_read_as_they_are_written(text, given):
    assert parse_params(text) == given


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temprature=1", "`temprature` is no setting. Did you mean `temperature`?"),
        ("quux=1", "`quux` is no setting. The settings are max_new_tokens, temperature"),
        ("temperature", "'temperature' is no setting. Write `name=value,name=value`"),
        ("", "'' is no setting."),
        ("top_k=2.5", "`top_k` must be a whole number, got '2.5'."),
        ("temperature=hot", "`temperature` must be a number, got 'hot'."),
        ("early_stopping=maybe", r"`early_stopping` must be one of \['false', 'true', 'never'\], got 'maybe'."),
        ("top_k=2,top-k=3", "`top_k` is given twice"),
    ],
)
def test_what_is_no_setting_is_refused_with_what_would_be_one(text, message):
    with pytest.raises(ValueError, match=message):
        parse_params(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0."),
        (
            {"temperature": -1.0},
            "`temperature` must be finite and at least 0, got -1.0. Divides the logits; 1 is",
        ),
        ({"num_beams": 0}, "`num_beams` must be at least 1, got 0."),
        ({"stop": ("a", "")}, "`stop` is empty"),
        ({"seed": -1}, r"`seed` must be at least 0 and below 9223372036854775808, got -1."),
        ({"num_beams": 2, "temperature": 0.5}, r"`temperature` has no effect: beam search \(`num_beams` 2\)"),
        ({"temperature": 0.0, "min_p": 0.1}, "`min_p` has no effect: at `temperature` 0"),
        ({"length_penalty": 2.0}, "`length_penalty` has no effect without beam search."),
        ({"early_stopping": True}, "`early_stopping` has no effect without beam search."),
    ],
)
def test_settings_that_cannot_be_or_do_nothing_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        change_params(DEFAULTS, given)


def test_what_is_not_given_has_its_default_and_is_never_refused():
    assert change_params(DEFAULTS, {"num_beams": 3}) == SamplingParams(num_beams=3)  # whatever the default temperature
    assert change_params(DEFAULTS, {"temperature": 0.0, "seed": 3, "repetition_penalty": 1.2}).top_k == 50


@pytest.mark.parametrize("name", OPTIONS)
def test_a_default_can_be_typed_and_every_option_has_its_help(name):
    typed = format_value(name, getattr(DEFAULTS, name))

    assert [parse_value(name, text) for text in typed] == [getattr(DEFAULTS, name)] * (name != "stop")
    assert OPTIONS[name].metadata["help"].endswith(".")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_p": math.nan}, "`min_p` must be at least 0 and at most 1, got nan. Smallest probability"),
        ({"temperature": math.inf}, "`temperature` must be finite and at least 0, got inf"),
        ({"length_penalty": math.inf}, "`length_penalty` must be finite, got inf. Of beam search: 0 scores by the sum"),
        ({"early_stopping": "always"}, r"`early_stopping` must be one of \[False, True, 'never'\], got 'always'"),
        ({"seed": 2**63}, "`seed` must be at least 0 and below 9223372036854775808"),
    ],
)
def test_params_out_of_their_range_cannot_be_made(given, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**given)


def test_what_is_no_option_is_refused():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)


def test_variants_have_what_is_common_and_their_own():
    variants = make_variants({"temperature": 0.5, "seed": 1}, ["num_beams=2", "top_k=3,temperature=2"])

    assert variants == {
        "num_beams=2": SamplingParams(temperature=0.5, seed=1, num_beams=2),
        "top_k=3,temperature=2": SamplingParams(temperature=2.0, seed=1, top_k=3),
    }


@pytest.mark.parametrize(
    ("given", "texts", "message"),
    [
        ({}, ["num_beams=2,top_k=3"], "'num_beams=2,top_k=3': `top_k` has no effect"),
        ({"num_beams": 2}, ["top_k=3"], "'top_k=3': `top_k` has no effect"),
        ({"top_k": 3}, ["num_beams=2", "temperature=0"], "`top_k` has no effect"),
        ({}, ["top_k=3", "top_k=3"], "'top_k=3' is to be compared twice"),
    ],
)
def test_variants_in_which_something_does_nothing_are_refused(given, texts, message):
    with pytest.raises(ValueError, match=message):
        make_variants(given, texts)
