"""Promises about what `generate` writes."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from hfgpt.check.batches import (
    LENGTHS,
    cache_argument,
    cache_of,
    can_generate,
    input_embeddings,
    keeps_cache,
    logits,
    pad,
    takes,
)
from hfgpt.check.promise import Finding, holds, not_applicable, promise
from hfgpt.check.subject import Subject

NEW_TOKENS = 8


def write(model: Any, ids: Tensor | None, **settings: Any) -> Any:
    """What `generate` writes: `NEW_TOKENS` tokens, greedily unless `settings` say otherwise."""
    model.generation_config = GenerationConfig(pad_token_id=0)  # none of the settings that came with the weights
    if ids is not None:
        settings.setdefault("attention_mask", torch.ones_like(ids))  # or id 0 in a text would be taken for padding
    return model.generate(ids, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **settings})


def same_text(found: Tensor, expected: Tensor, detail: str) -> Finding:
    """Whether two batches of ids are equal: how many ids differ."""
    if found.shape != expected.shape:
        return holds(False, f"{detail}: shape {tuple(found.shape)} for {tuple(expected.shape)}", "another shape")
    different = int((found != expected).sum())
    return holds(different == 0, detail, f"{different} of {found.numel()} ids differ", "0")


def if_it_generates(find: Callable[[Subject], Finding]) -> Callable[[Subject], Finding]:
    """Leave a promise out for a class that has no `generate`; that it has none is a finding of its own."""

    @wraps(find)
    def wrapper(subject: Subject) -> Finding:
        return find(subject) if can_generate(subject) else not_applicable("the class has no `generate`")

    return wrapper


@promise(
    "generation",
    meaning="`model.generate` and the text-generation pipeline do not work.",
    usual_causes="The class does not inherit from transformers' `GenerationMixin`.",
)
def the_class_can_generate(subject: Subject) -> Finding:
    """Whether there is a method `generate`."""
    return holds(can_generate(subject), f"`generate` of {subject.model_class.__name__}")


@promise(
    "generation",
    meaning="`generate` writes something else than the model's likeliest tokens.",
    usual_causes="`prepare_inputs_for_generation` drops or repeats tokens, or logits are of another token.",
)
@if_it_generates
def greedy_text_is_the_likeliest(subject: Subject) -> Finding:
    """`generate` without a cache against a loop that takes the likeliest token."""
    model, ids = subject.make(), subject.ids(2, 7)
    expected = ids
    for _ in range(NEW_TOKENS):
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(dim=-1)], dim=1)
    return same_text(write(model, ids, use_cache=False), expected, "greedy text against a loop by hand")


@promise(
    "generation",
    meaning="The text depends on whether keys and values are kept.",
    usual_causes="`forward` takes the cache and does not fill or read it, or the positions of a step are wrong.",
)
@if_it_generates
def generating_with_a_cache_changes_no_text(subject: Subject) -> Finding:
    """Greedy text with and without a cache."""
    if not keeps_cache(subject):
        return not_applicable("forward takes no cache")
    model, ids = subject.make(), subject.ids(2, 7)
    return same_text(write(model, ids), write(model, ids, use_cache=False), "greedy text with and without a cache")


@promise(
    "generation",
    meaning="`cache_implementation='static'` writes another text, or fails.",
    usual_causes="The class makes a cache of its own in place of the one given.",
)
@if_it_generates
def generating_with_a_static_cache_changes_no_text(subject: Subject) -> Finding:
    """Greedy text with a static cache and without one."""
    if not keeps_cache(subject):
        return not_applicable("forward takes no cache")
    model, ids = subject.make(), subject.ids(2, 7)
    with torch.compiler.set_stance("force_eager"):  # what is asked is the text, not the compiler
        found = write(model, ids, cache_implementation="static")
    return same_text(found, write(model, ids, use_cache=False), "greedy text with a static cache and without")


@promise(
    "generation",
    meaning="A prompt's continuation depends on which prompts it is batched with.",
    usual_causes="`attention_mask` is not used, or positions count the padding.",
)
@if_it_generates
def batched_generation_equals_one_by_one(subject: Subject) -> Finding:
    """Prompts of several lengths, padded on the left, against each alone."""
    model, ids = subject.make(), subject.ids(3, 12)
    prompts, mask = pad(ids, "left")
    together = write(model, prompts, attention_mask=mask)[:, 12:]
    alone = [write(model, ids[[row], :length])[:, length:] for row, length in enumerate(LENGTHS)]
    return same_text(together, torch.cat(alone), "texts of a padded batch against each prompt alone")


@promise(
    "generation",
    meaning="Beam search writes texts that are not the likeliest ones.",
    usual_causes="The cache does not follow its beams: use transformers' `Cache`.",
)
@if_it_generates
def beam_search_with_a_cache_changes_no_text(subject: Subject) -> Finding:
    """Beam search with and without a cache."""
    model, ids = subject.make(), subject.ids(2, 7)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    found, expected = write(model, ids, **beams), write(model, ids, **beams, use_cache=False)
    return same_text(found, expected, "texts of three beams with and without a cache")


@promise(
    "generation",
    meaning="A seed does not bring a text back.",
    usual_causes="Dropout is on in eval mode, or something draws outside torch's generator.",
)
@if_it_generates
def a_seed_fixes_sampled_text(subject: Subject) -> Finding:
    """Sampled texts of one seed, with and without a cache, several for each prompt; and of another seed."""
    model, ids = subject.make(), subject.ids(2, 7)
    texts = []
    for seed, use_cache in ((0, True), (0, False), (1, True)):
        torch.manual_seed(seed)
        texts.append(write(model, ids, do_sample=True, top_k=0, num_return_sequences=3, use_cache=use_cache))
    if texts[0].shape != (6, 7 + NEW_TOKENS) or torch.equal(texts[0], texts[2]):
        return holds(False, f"three sampled texts a prompt: shape {tuple(texts[0].shape)}, or the same with each seed")
    return same_text(texts[0], texts[1], "sampled texts of one seed, with and without a cache")


@promise(
    "generation",
    meaning="Soft prompts, and tools that embed images or words themselves, do not work.",
    usual_causes="`inputs_embeds` is not taken by `forward`, or not used in place of `input_ids`.",
)
@if_it_generates
def embeddings_may_take_the_place_of_ids(subject: Subject) -> Finding:
    """Text after embeddings of a prompt against text after its ids."""
    if not takes(subject.model_class, "inputs_embeds"):
        return not_applicable("forward takes no `inputs_embeds`")
    if "inputs_embeds" not in inspect.signature(subject.model_class.prepare_inputs_for_generation).parameters:
        return not_applicable("`prepare_inputs_for_generation` names no `inputs_embeds`: `generate` refuses them")
    model, ids = subject.make(), subject.ids(2, 7)
    embedding = input_embeddings(model)
    if embedding is None:
        return not_applicable("the class names no embedding")
    with torch.no_grad():
        embeddings = embedding(ids)
    found = write(model, None, inputs_embeds=embeddings, attention_mask=torch.ones_like(ids))
    return same_text(found[:, -NEW_TOKENS:], write(model, ids)[:, 7:], "text after embeddings against after ids")


@promise(
    "generation",
    meaning="Assisted generation, which is to be faster only, changes the text.",
    usual_causes="Several tokens after a filled cache get wrong positions or a wrong mask.",
)
@if_it_generates
def prompt_lookup_changes_no_text(subject: Subject) -> Finding:
    """Greedy text with guesses from the prompt, which are taken back where they are wrong."""
    if not keeps_cache(subject):
        return not_applicable("forward takes no cache")
    model, ids = subject.make(), torch.cat([subject.ids(1, 5)] * 3, dim=1)
    return same_text(write(model, ids, prompt_lookup_num_tokens=3), write(model, ids), "greedy text with prompt lookup")


@promise(
    "generation",
    meaning="A conversation that goes on from its cache is answered as if it were another.",
    usual_causes="Positions start again at 0 though the cache holds tokens.",
)
@if_it_generates
def a_conversation_goes_on_from_its_cache(subject: Subject) -> Finding:
    """Four tokens, then four more from the cache, against eight at once."""
    if not keeps_cache(subject):
        return not_applicable("forward takes no cache")
    model, ids = subject.make(), subject.ids(2, 7)
    first = write(model, ids, max_new_tokens=4, return_dict_in_generate=True)
    found = write(model, first.sequences, max_new_tokens=4, **{cache_argument(model): cache_of(first)})
    return same_text(found, write(model, ids), "text in two turns against at once")
