"""How a text is written, as a user says it: the settings of decoding, their defaults, and whether they do anything."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from hfgpt.generation.logits import (
    check_rules,
)

EARLY_STOPPING = {"false": False, "true": True, "never": "never"}

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
HISTORY = ("repetition_penalty", "no_repeat_ngram_size")
SEARCH = ("length_penalty", "early_stopping")

EXPLORED = ("temperature=1", "temperature=0.1", "temperature=5", "top_k=3")
"""The settings compared where none are named: the lecture's temperatures, and top-k."""

UNCHANGED: dict[str, Any] = {"temperature": 1.0, "top_k": 0}
"""What they differ from: the model's own distribution."""


@dataclass(frozen=True)
class Settings:
    """How a text is written.

    Attributes:
        max_new_tokens: tokens to write, at least 1, if nothing ends the text before.
        temperature: see `hfgpt.generation.params.Rules`, as for the next five.
        top_k: see there.
        top_p: see there.
        min_p: see there.
        repetition_penalty: see there.
        no_repeat_ngram_size: see there.
        num_beams: 1 chooses token by token, more is beam search, which samples nothing.
        length_penalty: see `hfgpt.generation.beam_search.beam_search`.
        early_stopping: see there.
        stop: texts that end the text where they come, and are not part of it.
        seed: of the first sample of each prompt, in [0, 2**63); the next sample has the next one. None draws them.

    Raises:
        ValueError: a value that nothing can be written with.
    """

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {self.max_new_tokens}.")
        Rules(**self.some(*SAMPLING, *HISTORY))
        check_beams(self.num_beams, self.length_penalty, self.early_stopping)
        if "" in self.stop:
            raise ValueError("`stop` is empty: it would end every text before its first token.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` must be at least 0 and below 2**63, got {self.seed}.")

    def some(self, *names: str) -> dict[str, Any]:
        """Some of the settings, by name."""
        return {name: getattr(self, name) for name in names}


def parse_settings(text: str) -> dict[str, Any]:
    r"""Read settings as people write them: `temperature=0.8,top_k=50`.

    A comma starts the next setting only where `name=` follows, so a stop text may hold one. In a stop text `\n` is a
    line break; more stop texts are more `stop=`.

    Raises:
        ValueError: a name that is no setting, or a value of the wrong kind.
    """
    given: dict[str, Any] = {}
    for part in re.split(r",(?=\s*[\w-]+=)", text):
        name, is_given, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if not is_given or not name:
            raise ValueError(
                f"{part!r} is no setting. Write `name=value,name=value`, such as `temperature=0.8,top_k=50`."
            )
        parsed = parse_value(name, value)
        if name in given and name != "stop":
            raise ValueError(f"`{name}` is given twice in {text!r}.")
        given[name] = given.get(name, ()) + parsed if name == "stop" else parsed
    return given


def parse_value(name: str, value: str) -> Any:
    """Read the value of one setting.

    Raises:
        ValueError: there is no such setting, or the value is of another kind.
    """
    kinds = {field.name: field.type for field in fields(Settings)}
    if name not in kinds:
        nearest = difflib.get_close_matches(name, kinds, n=1)
        hint = f"Did you mean `{nearest[0]}`?" if nearest else f"The settings are {', '.join(kinds)}."
        raise ValueError(f"`{name}` is no setting. {hint}")
    if name == "stop":
        return (value.replace("\\n", "\n"),)
    if name == "early_stopping":
        if value.strip().lower() not in EARLY_STOPPING:
            raise ValueError(f"`early_stopping` must be one of {list(EARLY_STOPPING)}, got {value!r}.")
        return EARLY_STOPPING[value.strip().lower()]
    if name == "seed" and value.strip().lower() == "none":
        return None
    kind, word = (float, "a number") if kinds[name] is float else (int, "a whole number")
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"`{name}` must be {word}, got {value!r}.") from None


def without_effect(given: Iterable[str], settings: Settings) -> str | None:
    """Why one of the settings that a user gave would change nothing, or None if each has an effect.

    A seed is never among them: it promises the same text again, which other decoding gives anyway.
    """
    for name in given:
        if name in SAMPLING and settings.num_beams > 1:
            return f"`{name}` has no effect: beam search (`num_beams` {settings.num_beams}) samples nothing."
        if name in SAMPLING[1:] and settings.temperature == 0:
            return f"`{name}` has no effect: at `temperature` 0 the likeliest token is taken."
        if name in SEARCH and settings.num_beams == 1:
            return f"`{name}` has no effect without beam search. Set `num_beams` above 1."
    return None


def make_settings(given: Mapping[str, Any]) -> Settings:
    """Fill up what a user gave with the defaults.

    Raises:
        ValueError: a value that nothing can be written with, or one that has no effect.
    """
    settings = Settings(**given)
    if reason := without_effect(given, settings):
        raise ValueError(reason)
    return settings


def make_variants(given: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Settings]:
    """Settings to compare: what `given` has for all of them, and each text's own on top.

    Args:
        given: settings for all.
        texts: see `parse_settings`.

    Returns:
        By text, in their order.

    Raises:
        ValueError: a value that nothing can be written with, or that has no effect: one of a text in that text's
            settings, one of `given` in none of them.
    """
    variants = {}
    for text in texts:
        if text in variants:
            raise ValueError(f"{text!r} is to be compared twice.")
        own = parse_settings(text)
        variants[text] = Settings(**{**given, **own})
        if reason := without_effect(own, variants[text]):
            raise ValueError(f"{text!r}: {reason}")
    for name in given:
        reasons = [without_effect([name], settings) for settings in variants.values()]
        if all(reasons):
            raise ValueError(str(reasons[0]))
    return variants


def explored_variants(texts: Sequence[str]) -> dict[str, Settings]:
    """Settings to compare the next token under, by the words that they were given in; see `parse_settings`.

    Raises:
        ValueError: a value that cannot be, or one that has no effect on the choice of one token.
    """
    for text in texts:
        for name in parse_settings(text):
            if name not in (*SAMPLING, *HISTORY):
                raise ValueError(f"{text!r}: `{name}` has no effect on the distribution of the next token.")
    return make_variants(UNCHANGED, texts)


@dataclass(frozen=True)
class Rules:
    """How the next token is chosen; every default leaves the model's own distribution as it is.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token, and then the next three have no effect.
        top_k: see `filter_top_k`; 0 keeps every token.
        top_p: see `filter_top_p`; 1 keeps every token.
        min_p: see `filter_min_p`; 0 keeps every token.
        repetition_penalty: see `penalize_repetition`; 1 changes nothing.
        no_repeat_ngram_size: see `forbid_repeated_ngrams`; 0 forbids nothing.

    Raises:
        ValueError: a value that `check_rules` refuses.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        check_rules(**asdict(self))


def check_beams(num_beams: int, length_penalty: float, early_stopping: bool | str) -> None:
    """Refuse settings that no beam search can have.

    Raises:
        ValueError: `num_beams` is below 1, `length_penalty` not finite, or `early_stopping` none of `EARLY_STOPPING`.
    """
    if num_beams < 1:
        raise ValueError(f"`num_beams` must be at least 1, got {num_beams}.")
    if not math.isfinite(length_penalty):
        raise ValueError(
            f"`length_penalty` must be a finite number, got {length_penalty}. 0 scores by the sum, 1 by the mean."
        )
    if early_stopping not in EARLY_STOPPING.values():
        raise ValueError(f"`early_stopping` must be one of {list(EARLY_STOPPING.values())}, got {early_stopping!r}.")
