"""Whether a causal language model keeps what transformers and its users rely on, promise by promise."""

from hfgpt.check.run import Report, Result, check

__all__ = ["Report", "Result", "check"]
