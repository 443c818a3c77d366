"""Promises that models of transformers' own are known not to keep, and where that is discussed."""

from dataclasses import dataclass

from hfgpt.check.subject import Subject


@dataclass(frozen=True)
class KnownFault:
    """Why a model of transformers' own breaks a promise.

    Attributes:
        explanation: one sentence.
        link: where it is discussed, or the line.
    """

    explanation: str
    link: str


ISSUES = "https://github.com/huggingface/transformers/issues"
PULLS = "https://github.com/huggingface/transformers/pull"

NO_POSITIONS_FROM_MASK = KnownFault(
    "Without `position_ids`, positions are counted from the row's first place, padding included; only `generate` makes "
    "them from the mask.",
    f"{ISSUES}/18388",
)
NO_LIMIT = KnownFault("The embedding's own error is raised, or on a GPU an assertion.", f"{ISSUES}/530")
POSITIONS_UNUSED = KnownFault("The mask does not look at `position_ids`.", f"{PULLS}/39194")

NO_LOSS_TYPE = KnownFault(
    "GPT2LMHeadModel has no `loss_type`, which transformers reads from `ForCausalLM` in a class's name: Trainer counts "
    "each row's first token as a target, and the warning about it breaks the compiled graph. Set "
    '`model.loss_type = "ForCausalLM"`.',
    f"{PULLS}/46204",
)

KNOWN_FAULTS: dict[tuple[str, str], KnownFault] = {
    ("*", "packed-documents-do-not-leak-by-default"): KnownFault(
        "`create_causal_mask` looks at `position_ids` only without a mask and without a cache.", f"{PULLS}/46634"
    ),
    ("gpt2", "left-padding-changes-nothing"): NO_POSITIONS_FROM_MASK,
    ("gpt2", "more-tokens-than-positions-are-refused-or-harmless"): NO_LIMIT,
    ("gpt2", "trainer-is-a-plain-loop"): NO_LOSS_TYPE,
    ("gpt2", "compiled-step-is-one-graph"): NO_LOSS_TYPE,
    ("gpt_neo", "left-padding-changes-nothing"): NO_POSITIONS_FROM_MASK,
    ("gpt_neo", "more-tokens-than-positions-are-refused-or-harmless"): NO_LIMIT,
    ("opt", "more-tokens-than-positions-are-refused-or-harmless"): NO_LIMIT,
    ("opt", "packed-documents-do-not-leak"): POSITIONS_UNUSED,
}
"""By `model_type`, or "*" for all, and the promise's name."""


def find_known_fault(subject: Subject, name: str) -> KnownFault | None:
    """The known fault that explains a broken promise; None if the class is not transformers' own or none is known."""
    if not subject.model_class.__module__.startswith("transformers."):
        return None
    return KNOWN_FAULTS.get((subject.config.model_type, name), KNOWN_FAULTS.get(("*", name)))
