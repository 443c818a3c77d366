"""Promises about masks, padding and positions."""

import torch

from hfgpt.check.promise import Finding, at_most, max_difference, promise
from hfgpt.check.subject import Subject


@promise(
    "masks",
    meaning="The model sees the tokens that it is to predict: its training loss is worth nothing.",
    usual_causes="`is_causal` or the causal mask is missing, is built for the wrong axis, or is off by one.",
)
def changing_a_token_leaves_earlier_logits(subject: Subject) -> Finding:
    """Change a token in the middle, and look at what is said before it."""
    model, ids = subject.make(), subject.ids(2, 12)
    changed = ids.clone()
    changed[:, 7] = ids[:, 7] % (subject.vocab_size - 1) + 1

    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    return at_most(max_difference(before[:, :7], after[:, :7]), 0.0, "logits before a token that was changed")
