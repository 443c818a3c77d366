"""Promises about the keys and values that a model keeps for the next step."""

from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from hfgpt.check.batches import cache_argument, cache_of, keeps_cache, logits, pad, takes
from hfgpt.check.promise import Finding, close, holds, not_applicable, promise, worst
from hfgpt.check.subject import Subject

NO_CACHE = "forward takes no cache: each new token computes the whole text again"
PARTS = ((0, 5), (5, 7), (7, 8), (8, 9), (9, 12))
"""Begin and end of the pieces in which a text of 12 tokens is read."""


@torch.no_grad()
def step(model: Any, ids: Tensor, cache: Any, **arguments: Any) -> Any:
    """The output of a pass that goes on from a cache, if there is one."""
    return model(ids, **arguments, **({} if cache is None else {cache_argument(model): cache}))


@torch.no_grad()
def read_in_parts(model: Any, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits of a text that is read piece by piece, (B, T, V), and the cache at its end."""
    found = []
    for begin, end in PARTS:
        output = step(model, ids[:, begin:end], cache, use_cache=True)
        cache = cache_of(output)
        assert cache is not None, "forward was given use_cache=True, and returned no cache"
        found.append(output.logits)
    return torch.cat(found, dim=1), cache


@promise(
    "cache",
    meaning="Generated text differs from what the model would say of it: every step after the first is wrong.",
    usual_causes="The cache is not updated, or positions or the mask of a step do not count what the cache holds.",
)
def cached_logits_equal_uncached(subject: Subject) -> Finding:
    """A text read in pieces against the text read at once."""
    if not keeps_cache(subject):
        return not_applicable(NO_CACHE)
    model, ids = subject.make(), subject.ids(2, 12)
    found, cache = read_in_parts(model, ids)
    length = int(cache.get_seq_length())
    if length != 12:
        return holds(False, f"the cache of 12 tokens says that it holds {length}", length, 12)
    return close(found, logits(model, ids, use_cache=False), "logits of a text in pieces against at once")


@promise(
    "cache",
    meaning="`cache_implementation='static'`, which compiled generation uses, writes another text.",
    usual_causes="The mask is as long as the text and not as the cache, or a length is read off the keys' shape.",
)
def a_static_cache_gives_the_same_logits(subject: Subject) -> Finding:
    """The same with a cache that has room for more from the beginning."""
    if not keeps_cache(subject):
        return not_applicable(NO_CACHE)
    model, ids = subject.make(), subject.ids(2, 12)
    found, _ = read_in_parts(model, ids, StaticCache(config=model.config, max_cache_len=20))
    return close(found, logits(model, ids, use_cache=False), "logits with a static cache against at once")


@promise(
    "cache",
    meaning="Beam search writes texts that the model finds unlikely.",
    usual_causes="Keys and values are kept outside the cache, or the cache is no transformers `Cache`.",
)
def a_cache_follows_its_beams(subject: Subject) -> Finding:
    """Rows of a cache exchanged, then a step."""
    if not keeps_cache(subject):
        return not_applicable(NO_CACHE)
    model, ids = subject.make(), subject.ids(3, 12)
    order = torch.tensor([2, 0, 0])
    _, cache = read_in_parts(model, ids)
    cache.reorder_cache(order)
    following = subject.ids(3, 1, seed=1)
    found = step(model, following, cache).logits
    expected = logits(model, torch.cat([ids[order], following], dim=1), use_cache=False)[:, -1:]
    return close(found, expected, "a step after the rows of the cache were exchanged, against the texts at once")


@promise(
    "cache",
    meaning="Assisted generation, which takes tokens back, goes wrong after the first token that is taken back.",
    usual_causes="Positions are counted by the model and not by the cache, or keys are kept outside the cache.",
)
def a_cache_can_be_cut(subject: Subject) -> Finding:
    """The last tokens of a cache taken back, then others put in their place."""
    if not keeps_cache(subject):
        return not_applicable(NO_CACHE)
    model, ids = subject.make(), subject.ids(2, 12)
    _, cache = read_in_parts(model, ids)
    if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        return not_applicable("a sliding window forgets what a cut would need")
    cache.crop(-3)
    following = subject.ids(2, 3, seed=1)
    found = step(model, following, cache).logits
    expected = logits(model, torch.cat([ids[:, :9], following], dim=1), use_cache=False)[:, -3:]
    return close(found, expected, "three tokens in place of three taken back, against the texts at once")


@promise(
    "cache",
    meaning="A prompt shorter than others in its batch is continued wrongly from its second new token on.",
    usual_causes="Positions that are given are not used in a step, or the mask of the whole row is not.",
)
def cached_steps_of_padded_rows_equal_uncached(subject: Subject) -> Finding:
    """Rows padded on the left, and two steps of which the positions are given, as `generate` does."""
    if not keeps_cache(subject):
        return not_applicable(NO_CACHE)
    model, ids = subject.make(), subject.ids(3, 12)
    padded, mask = pad(ids, "left")
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    takes_positions = takes(model, "position_ids")  # otherwise it makes them of the mask
    cache, findings = None, []

    def given(begin: int, end: int) -> dict[str, Tensor]:
        places = {"position_ids": positions[:, begin:end]} if takes_positions else {}
        return {"attention_mask": mask[:, :end], **places}

    whole = logits(model, padded, **given(0, 12), use_cache=False)
    for begin, end in ((0, 10), (10, 11), (11, 12)):
        output = step(model, padded[:, begin:end], cache, **given(begin, end), use_cache=True)
        cache = cache_of(output)
        seen = mask[:, begin:end] == 1
        findings.append(close(output.logits[seen], whole[:, begin:end][seen], "steps of padded rows against at once"))
    return worst(findings)


@promise(
    "cache",
    meaning="Training and scoring keep copies of all keys and values, and packed documents may see each other.",
    usual_causes="`use_cache` is not read.",
)
def no_cache_is_kept_unless_asked_for(subject: Subject) -> Finding:
    """`use_cache=False`."""
    if not keeps_cache(subject):
        return not_applicable(NO_CACHE)
    with torch.no_grad():
        cache = cache_of(subject.make()(subject.ids(1, 5), use_cache=False))
    return holds(cache is None, "a pass with use_cache=False", "a cache" if cache is not None else "none", "none")
