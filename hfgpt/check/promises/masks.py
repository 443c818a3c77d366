"""Promises about masks, padding and positions."""

from typing import Any

import torch
from torch import Tensor, nn

from hfgpt.check.batches import LENGTHS, count_positions, input_embeddings, logits, pad, takes
from hfgpt.check.promise import Finding, close, holds, not_applicable, promise, worst
from hfgpt.check.subject import Subject

NO_POSITIONS = "forward takes no `position_ids`"


@promise(
    "masks",
    meaning="The model sees the tokens that it is to predict: its training loss is worth nothing.",
    usual_causes="The causal mask is missing, is built along the wrong axis or off by one, or `is_causal` is False.",
)
def changing_a_token_leaves_earlier_logits(subject: Subject) -> Finding:
    """Change a token in the middle, and look at what is said before it."""
    model, ids = subject.make(), subject.ids(2, 12)
    changed = ids.clone()
    changed[:, 7] = ids[:, 7] % (subject.vocab_size - 1) + 1
    findings = []
    for mask in (None, torch.ones_like(ids)):
        before, after = (logits(model, each, attention_mask=mask) for each in (ids, changed))
        findings.append(close(after[:, :7], before[:, :7], "logits before a token that was changed"))
        if torch.equal(before[:, 7:], after[:, 7:]):
            return holds(False, "no logit changes with a token: the model does not read its input")
    return worst(findings)


def padded_rows(subject: Subject, side: str, **given: Any) -> Finding:
    """Logits of padded rows against those of each row alone."""
    model, ids = subject.make(), subject.ids(3, 12)
    padded, mask = pad(ids, side)
    arguments = {"position_ids": count_positions(mask)} if given.get("with_positions") else {}
    together = logits(model, padded, attention_mask=mask, **arguments)
    alone = [logits(model, ids[[row], :length])[0] for row, length in enumerate(LENGTHS)]
    return close(together[mask == 1], torch.cat(alone), f"logits of {side}-padded rows against each row alone")


@promise(
    "masks",
    meaning="Scores of texts depend on what they are batched with, and `generate` on prompts of several lengths errs.",
    usual_causes="Positions are counted from the row's first place and not from `attention_mask`, or it is not used.",
)
def left_padding_changes_nothing(subject: Subject) -> Finding:
    """Rows of several lengths, padded on the left, with `attention_mask` alone."""
    return padded_rows(subject, "left")


@promise(
    "masks",
    meaning="Whoever gives positions, as `generate` does, gets other logits for a padded row than for the row alone.",
    usual_causes="`position_ids` or `attention_mask` is taken and not used.",
)
def left_padding_with_positions_changes_nothing(subject: Subject) -> Finding:
    """The same, with the positions that leave padding out."""
    if not takes(subject.model_class, "position_ids"):
        return not_applicable(NO_POSITIONS)
    return padded_rows(subject, "left", with_positions=True)


@promise(
    "masks",
    meaning="The loss of a text depends on how much padding it was batched with.",
    usual_causes="The attention is not causal, or positions are shifted by the padding that follows.",
)
def right_padding_changes_nothing(subject: Subject) -> Finding:
    """Rows of several lengths, padded on the right."""
    return padded_rows(subject, "right")


@promise(
    "masks",
    meaning="`position_ids` are ignored or counted otherwise: packing, padding and cached steps are wrong.",
    usual_causes="`forward` makes positions of its own in place of those given.",
)
def positions_given_are_used(subject: Subject) -> Finding:
    """Positions from 0 change nothing; others change something, or for rotary ones only their differences count."""
    if not takes(subject.model_class, "position_ids"):
        return not_applicable(NO_POSITIONS)
    model, ids = subject.make(), subject.ids(2, 12)
    expected, positions = logits(model, ids), torch.arange(12).expand(2, -1)
    spread = logits(model, ids, position_ids=positions * 2)
    if positions_matter(subject) and torch.equal(spread, expected):
        return holds(False, "positions twice as far apart change no logit")
    return close(logits(model, ids, position_ids=positions), expected, "logits with positions 0, 1, 2 ... given")


def positions_matter(subject: Subject) -> bool:
    """Whether the model knows the order of its tokens otherwise than by its causal mask.

    Without positions, all rotations or embeddings gone, the last token sees a set: the earlier ones may be exchanged.
    """
    model, ids = (
        subject.make(num_hidden_layers=1) if can_have_one_layer(subject) else subject.make(),
        subject.ids(2, 12),
    )
    exchanged = ids[:, [*range(10, -1, -1), 11]]
    first, second = (logits(model, each)[:, -1] for each in (ids, exchanged))
    return close(first, second, "").status == "fail"


def can_have_one_layer(subject: Subject) -> bool:
    """Whether the config has the field by transformers' name, and no list with an entry for each layer."""
    values = subject.config.to_dict()
    layers = values.get("num_hidden_layers")
    return layers is not None and not any(isinstance(each, list) and len(each) == layers for each in values.values())


@promise(
    "masks",
    meaning="Texts that were packed into one row see each other where Trainer packs them.",
    usual_causes="`position_ids` that start again do not reach the mask: use transformers' `create_causal_mask`.",
)
def packed_documents_do_not_leak(subject: Subject) -> Finding:
    """Two documents in one row, told apart by positions that start again, without a cache and a mask."""
    return packed(subject, use_cache=False)


@promise(
    "masks",
    meaning="Texts that were packed into one row see each other in a training loop written by hand.",
    usual_causes="A cache, or a mask of ones, hides from `create_causal_mask` that positions start again.",
)
def packed_documents_do_not_leak_by_default(subject: Subject) -> Finding:
    """The same as a loop by hand calls it: nothing is said of the cache, and the mask is all ones."""
    return packed(subject, attention_mask=torch.ones(1, 13, dtype=torch.long))


def packed(subject: Subject, **arguments: Any) -> Finding:
    """Logits of two documents in one row against those of each alone."""
    if not takes(subject.model_class, "position_ids"):
        return not_applicable(NO_POSITIONS)
    model, ids = subject.make(), subject.ids(1, 13)
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
    together = logits(model, ids, position_ids=positions, **arguments)
    alone = torch.cat([logits(model, ids[:, :6]), logits(model, ids[:, 6:])], dim=1)
    return close(together, alone, "logits of two documents in one row against each alone")


def position_tables(model: nn.Module, positions: int) -> list[str]:
    """Names of the embeddings that have a row for each position, or a few more."""
    tokens = input_embeddings(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and module is not tokens
        and positions <= module.num_embeddings <= positions + 8
    ]


@promise(
    "masks",
    meaning="A text that is too long gets garbage, an error that explains nothing, or on a GPU the end of the process.",
    usual_causes="`forward` does not compare the sequence's length with the number of positions.",
)
def more_tokens_than_positions_are_refused_or_harmless(subject: Subject) -> Finding:
    """A text longer than the table of positions; models that compute positions may go on beyond it."""
    limit, model = subject.positions, subject.make()
    ids = subject.ids(1, limit + 4)
    try:
        found = logits(model, ids)
    except Exception as error:  # whichever it is, what counts is whether it says the limit
        words = next(iter(str(error).splitlines()), "")
        says_limit = str(limit) in words and not isinstance(error, IndexError)
        return holds(says_limit, f"{limit + 4} tokens: {type(error).__name__}: {words}", type(error).__name__)
    tables = position_tables(model, limit)
    if tables:
        return holds(False, f"{tables[0]} has {limit} positions, and {limit + 4} tokens got logits", "garbage", "error")
    return beyond(found, logits(model, ids[:, :limit]), limit)


def beyond(found: Tensor, short: Tensor, limit: int) -> Finding:
    """Logits of a longer text, against those of its beginning."""
    if not found.isfinite().all():
        return holds(False, f"logits are not finite beyond {limit} tokens", "not finite", "finite")
    return close(found[:, :limit], short, f"logits of the first {limit} tokens of a longer text")
