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


KNOWN_FAULTS: dict[tuple[str, str], KnownFault] = {}
"""By `model_type` and the promise's name."""


def find_known_fault(subject: Subject, name: str) -> KnownFault | None:
    """The known fault that explains a broken promise; None if the class is not transformers' own or none is known."""
    if not subject.model_class.__module__.startswith("transformers."):
        return None
    return KNOWN_FAULTS.get((subject.config.model_type, name))
