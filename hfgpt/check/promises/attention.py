"""Promises about attention implementations, half precision, dropout and determinism."""

from typing import Any

import torch
from torch import Tensor

from hfgpt.check.batches import count_positions, logits, pad, takes
from hfgpt.check.promise import Finding, at_most, close, holds, max_difference, not_applicable, promise, worst
from hfgpt.check.subject import Subject


def same_as_eager(subject: Subject, attention: str) -> Finding:
    """Logits of an attention implementation against eager's, of whole rows and of padded ones."""
    eager, other, ids = subject.make(attention="eager"), subject.make(attention=attention), subject.ids(3, 12)
    findings = []
    for side in (None, "left", "right"):
        given, mask = (ids, torch.ones_like(ids)) if side is None else pad(ids, side)
        arguments: dict[str, Any] = {} if side is None else {"attention_mask": mask}
        if side is not None and takes(subject.model_class, "position_ids"):
            arguments["position_ids"] = count_positions(mask)
        with torch.compiler.set_stance("force_eager"):  # flex_attention compiles itself, which takes a C++ compiler
            found = logits(other, given, **arguments)[mask == 1]
        findings.append(close(found, logits(eager, given, **arguments)[mask == 1], f"{attention} against eager"))
    return worst(findings)


@promise(
    "attention",
    meaning="The same weights say something else with `attn_implementation='sdpa'`, transformers' default.",
    usual_causes="A scale, a mask or dropout is applied in one path only.",
)
def sdpa_gives_the_same_logits_as_eager(subject: Subject) -> Finding:
    """Torch's `scaled_dot_product_attention` against eager attention."""
    if not getattr(subject.model_class, "_supports_sdpa", False):
        return not_applicable("the class does not say `_supports_sdpa`")
    return same_as_eager(subject, "sdpa")


@promise(
    "attention",
    meaning="The same weights say something else with `attn_implementation='flex_attention'`.",
    usual_causes="The block mask is not handed on, or a scale is applied in one path only.",
)
def flex_attention_gives_the_same_logits_as_eager(subject: Subject) -> Finding:
    """Torch's flex_attention against eager attention."""
    if not getattr(subject.model_class, "_supports_flex_attn", False):
        return not_applicable("the class does not say `_supports_flex_attn`")
    return same_as_eager(subject, "flex_attention")


@promise(
    "attention",
    meaning="In bf16 the model says something else, or NaN.",
    usual_causes="A mask of -inf meets a row of padding alone, or fp32 is written into a buffer or an addition.",
)
def bf16_gives_nearly_the_same_logits(subject: Subject) -> Finding:
    """The distance of logits in bf16 from those in fp32, in units of the latter; padded rows must be finite."""
    whole, half = subject.make(), subject.make(dtype=torch.bfloat16)
    ids = subject.ids(3, 12)
    padded, mask = pad(ids, "left")
    if not logits(half, padded, attention_mask=mask)[mask == 1].isfinite().all():
        return holds(False, "logits of padded rows in bf16", "not finite", "finite")
    expected, found = logits(whole, ids), logits(half, ids)
    distance = ((found.float() - expected).norm() / expected.norm()).item()
    return at_most(distance, 0.05, f"relative distance of bf16 logits ({found.dtype}) from fp32's")


def two_passes(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of two passes with other random numbers."""
    torch.manual_seed(0)
    first = logits(model, ids, use_cache=False)
    torch.manual_seed(1)
    return first, logits(model, ids, use_cache=False)


@promise(
    "attention",
    meaning="Evaluation and generation are random.",
    usual_causes="`F.dropout` without `training=self.training`, or `dropout_p` is given to attention in eval mode.",
)
def dropout_is_off_in_eval(subject: Subject) -> Finding:
    """Two passes in eval mode, every dropout of the config at a half."""
    half: dict[str, Any] = dict.fromkeys(subject.no_dropout, 0.5)
    first, second = two_passes(subject.make(**half), subject.ids(2, 12))
    plain = logits(subject.make(**subject.no_dropout), subject.ids(2, 12), use_cache=False)
    detail = "two passes in eval mode, and one of a model without dropout"
    return at_most(max(max_difference(first, second), max_difference(first, plain)), 0.0, detail)


@promise(
    "attention",
    meaning="A dropout that the config names does nothing: training is regularised less than its config says.",
    usual_causes="The field is not read, or the attention function is not given `dropout` in training.",
)
def each_dropout_of_the_config_has_an_effect(subject: Subject) -> Finding:
    """Each dropout alone at a half: two passes in training mode must differ, and without any they must not."""
    if not subject.no_dropout:
        return not_applicable("the config names no dropout")
    ids = subject.ids(2, 12)
    first, second = two_passes(subject.make(**subject.no_dropout).train(), ids)
    if not torch.equal(first, second):
        return holds(False, "two passes in training mode differ though every dropout is 0")
    without_effect = [
        name
        for name in subject.no_dropout
        if torch.equal(*two_passes(subject.make(**{**subject.no_dropout, name: 0.5}).train(), ids))
    ]
    return holds(not without_effect, "without effect: " + (", ".join(without_effect) or "none"))


@promise(
    "attention",
    meaning="The same input gives other logits: no result can be repeated.",
    usual_causes="State is kept between passes, or something is drawn in eval mode.",
)
def the_same_input_gives_the_same_bits(subject: Subject) -> Finding:
    """Two passes with another text between them."""
    model, ids = subject.make(), subject.ids(2, 12)
    first = logits(model, ids)
    logits(model, subject.ids(3, 9, seed=1))
    return at_most(max_difference(first, logits(model, ids)), 0.0, "two passes, another text between them")


@promise(
    "attention",
    meaning="What is said of a text depends on the texts beside it in the batch.",
    usual_causes="A sum, a mean or a norm goes over the batch.",
)
def a_row_does_not_depend_on_its_neighbours(subject: Subject) -> Finding:
    """A batch against each of its rows alone."""
    model, ids = subject.make(), subject.ids(3, 12)
    alone = torch.cat([logits(model, ids[[row]]) for row in range(3)])
    return close(logits(model, ids), alone, "a batch against each of its rows alone")
