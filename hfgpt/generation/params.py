"""`SamplingParams`: every option of generation with its default, range and help; how people write options down.

The command line makes its options from the fields, so this file imports nothing heavy.
"""

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hfgpt.system.quoting import quote
from hfgpt.system.suggest import did_you_mean

BOUNDS = {
    "ge": ("at least", operator.ge),
    "gt": ("above", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}

NUMBER_TYPES: dict[Any, type[int] | type[float]] = {int: int, float: float, int | None: int}
"""What options of numbers are annotated with, and what their words are read by."""

EARLY_STOPPING = {"false": False, "true": True, "never": "never"}

EXPLORED = ("temperature=1", "temperature=0.1", "temperature=5", "top_k=3")
"""What `hfgpt explore` compares if nothing is named: the lecture's temperatures, and top-k."""


def option(default: Any, help: str, acts_on: str = "", metavar: str | None = None, **bounds: float) -> Any:
    """A field of `SamplingParams`.

    Args:
        default: its default.
        help: a line for `hfgpt generate --help` and for the error about a value out of range.
        acts_on: "history" (earlier tokens), "distribution" (of the next token, so only where tokens are sampled),
            "search" (beam search), or "" for what has an effect everywhere.
        metavar: how `--help` writes the value, where its type does not say it.
        **bounds: `ge`, `gt`, `le`, `lt`, as in `BOUNDS`; a float must be finite, too.
    """
    metadata = {"help": help, "acts_on": acts_on, "metavar": metavar, "bounds": bounds}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SamplingParams:
    """How a text is generated; the defaults are those of `hfgpt generate`.

    logits.py says what each rule does to the logits, beam_search.py what its options do.

    Raises:
        ValueError: a value is out of its range.
    """

    max_new_tokens: int = option(100, "Tokens to write.", ge=1)
    temperature: float = option(
        0.8, "Divides the logits; 1 is the model's own distribution, 0 takes the likeliest token.", "distribution", ge=0
    )
    top_k: int = option(50, "Likeliest tokens to draw from; 0 draws from all.", "distribution", ge=0)
    top_p: float = option(
        1.0, "Probability of the likeliest tokens to draw from; 1 draws from all.", "distribution", gt=0, le=1
    )
    min_p: float = option(
        0.0, "Smallest probability to draw, as a share of the largest; 0 draws from all.", "distribution", ge=0, le=1
    )
    repetition_penalty: float = option(
        1.0, "Above 1: makes tokens that came before less likely; 1 changes nothing.", "history", gt=0
    )
    no_repeat_ngram_size: int = option(
        0, "No sequence of so many tokens comes twice; 0 forbids nothing.", "history", ge=0
    )
    num_beams: int = option(1, "Above 1: beam search, which samples nothing.", ge=1)
    length_penalty: float = option(
        1.0, "Of beam search: 0 scores by the sum, 1 by the mean; more favours long texts.", "search"
    )
    early_stopping: bool | str = option(
        False, "When beam search stops looking for better.", "search", metavar="|".join(EARLY_STOPPING)
    )
    stop: tuple[str, ...] = option((), "Ends the text before it; `\\n` is a line break; repeatable.", metavar="TEXT")
    seed: int | None = option(None, "Fixes the texts; sample n has the seed SEED + n.", ge=0, lt=2**63)

    def __post_init__(self) -> None:
        for name, each in OPTIONS.items():
            value = getattr(self, name)
            if each.type in NUMBER_TYPES and value is not None and not is_in_range(name, value):
                raise ValueError(range_error(name, value))
        if self.early_stopping not in EARLY_STOPPING.values():
            allowed = list(EARLY_STOPPING.values())
            raise ValueError(f"`early_stopping` must be one of {allowed}, got {self.early_stopping!r}.")
        if "" in self.stop:
            raise ValueError("`stop` is empty: it would end every text before its first token.")


OPTIONS = {each.name: each for each in fields(SamplingParams)}


def is_in_range(name: str, value: float) -> bool:
    """Whether an option may have a number."""
    bounds = OPTIONS[name].metadata["bounds"]
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return is_finite and all(BOUNDS[key][1](value, bound) for key, bound in bounds.items())


def range_error(name: str, value: float) -> str:
    """The message about a number that an option cannot have."""
    option = OPTIONS[name]
    limits = [f"{BOUNDS[key][0]} {bound}" for key, bound in option.metadata["bounds"].items()]
    finite = ["finite"] if option.type is float and len(limits) < 2 else []
    return f"`{name}` must be {' and '.join(finite + limits)}, got {value}. {option.metadata['help']}"


DEFAULTS = SamplingParams()

OWN_DISTRIBUTION = SamplingParams(temperature=1.0, top_k=0)
"""No rule changes what the model predicts."""


def parse_params(text: str) -> dict[str, Any]:
    r"""Read options as people write them: `temperature=0.8,top_k=50`.

    A comma starts the next option only where `name=` follows, so a stop text may hold one. In a stop text `\n` is a
    line break; more stop texts are more `stop=`.

    Raises:
        ValueError: there is no such option, or its value is of the wrong kind.
    """
    given: dict[str, Any] = {}
    for part in re.split(r",(?=\s*[\w-]+=)", text):
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ValueError(
                f"{part!r} is no setting. Write `name=value,name=value`, such as `temperature=0.8,top_k=50`."
            )
        parsed = parse_value(name, value)
        if name in given and name != "stop":
            raise ValueError(f"`{name}` is given twice in {quote(text)}.")
        given[name] = given.get(name, ()) + parsed if name == "stop" else parsed
    return given


def parse_value(name: str, text: str) -> Any:
    """Read the value of one option; that of `stop` becomes a tuple of one text.

    Raises:
        ValueError: there is no such option, or the value is of another kind.
    """
    if name not in OPTIONS:
        hint = did_you_mean(name, OPTIONS) or f" The settings are {', '.join(OPTIONS)}."
        raise ValueError(f"`{name}` is no setting.{hint}")
    if name == "stop":
        return (text.replace("\\n", "\n"),)
    word = text.strip().lower()
    if name == "early_stopping":
        if word not in EARLY_STOPPING:
            raise ValueError(f"`early_stopping` must be one of {list(EARLY_STOPPING)}, got {quote(text)}.")
        return EARLY_STOPPING[word]
    if name == "seed" and word == "none":
        return None
    kind = NUMBER_TYPES[OPTIONS[name].type]
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"`{name}` must be a {'whole ' * (kind is int)}number, got {quote(text)}.") from None


def format_value(name: str, value: Any) -> list[str]:
    """Write a value as `parse_value` reads it; several texts of `stop`, or none."""
    if name == "stop":
        return [text.replace("\n", "\\n") for text in value]
    return [str(value).lower()]


def without_effect(given: Iterable[str], params: SamplingParams) -> str | None:
    """Why one of the options that a user gave would change nothing; None if each has an effect.

    A seed always passes: it promises the same text again, which greedy decoding and beam search give anyway.
    """
    for name in given:
        acts_on = OPTIONS[name].metadata["acts_on"]
        if acts_on == "distribution" and params.num_beams > 1:
            return f"`{name}` has no effect: beam search (`num_beams` {params.num_beams}) samples nothing."
        if acts_on == "distribution" and name != "temperature" and params.temperature == 0:
            return f"`{name}` has no effect: at `temperature` 0 the likeliest token is taken."
        if acts_on == "search" and params.num_beams == 1:
            return f"`{name}` has no effect without beam search. Set `num_beams` above 1."
    return None


def change_params(params: SamplingParams, given: Mapping[str, Any]) -> SamplingParams:
    """`params` with what a user gave.

    Raises:
        ValueError: a value is out of its range, or has no effect.
    """
    changed = replace(params, **given)
    if reason := without_effect(given, changed):
        raise ValueError(reason)
    return changed


def make_variants(
    given: Mapping[str, Any], texts: Sequence[str], base: SamplingParams = DEFAULTS
) -> dict[str, SamplingParams]:
    """Params to compare, by text: `base` with what is `given` for all, and on top what the text says.

    Raises:
        ValueError: a value is out of its range; one of a text has no effect, or one of `given` has none in any text.
    """
    variants: dict[str, SamplingParams] = {}
    for text in texts:
        if text in variants:
            raise ValueError(f"{quote(text)} is to be compared twice.")
        own = parse_params(text)
        variants[text] = replace(base, **{**given, **own})
        if reason := without_effect(own, variants[text]):
            raise ValueError(f"{quote(text)}: {reason}")
    for name in given:
        reasons = [without_effect([name], params) for params in variants.values()]
        if all(reasons):
            raise ValueError(str(reasons[0]))
    return variants


def explored_variants(texts: Sequence[str]) -> dict[str, SamplingParams]:
    """Params to compare the next token under, each the model's own distribution changed as a text says.

    Raises:
        ValueError: a value is out of its range, or has no effect on the distribution of the next token.
    """
    for text in texts:
        for name in parse_params(text):
            if OPTIONS[name].metadata["acts_on"] not in ("distribution", "history"):
                raise ValueError(f"{quote(text)}: `{name}` has no effect on the distribution of the next token.")
    return make_variants({}, texts, OWN_DISTRIBUTION)
