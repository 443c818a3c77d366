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


NO_LOSS_TYPE = KnownFault(
    "GPT2LMHeadModel has no `loss_type`, which transformers reads from `ForCausalLM` in a class's name: Trainer counts "
    "each row's first token as a target, and the warning about it breaks the compiled graph. Set "
    '`model.loss_type = "ForCausalLM"`.',
    "https://github.com/huggingface/transformers/pull/46204",
)
KNOWN_FAULTS: dict[tuple[str, str], KnownFault] = {
    ("gpt2", "trainer-is-a-plain-loop"): NO_LOSS_TYPE,
    ("gpt2", "compiled-step-is-one-graph"): NO_LOSS_TYPE,
}
"""By `model_type` and the promise's name."""


def find_known_fault(subject: Subject, name: str) -> KnownFault | None:
    """The known fault that explains a broken promise; None if the class is not transformers' own or none is known."""
    if not subject.model_class.__module__.startswith("transformers."):
        return None
    return KNOWN_FAULTS.get((subject.config.model_type, name))
