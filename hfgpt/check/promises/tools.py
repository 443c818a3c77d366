"""Promises about the tools that hold a model by its conventions: config, Auto classes, embeddings, devices, export."""

from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, pipeline

from hfgpt.check.batches import input_embeddings
from hfgpt.check.promise import Finding, at_most, holds, not_applicable, promise
from hfgpt.check.subject import Subject

NOT_ONES_OWN = {"transformers_version", "model_type", "architectures", "auto_map", "dtype", "torch_dtype"}
"""Fields of every config that transformers writes itself."""

MISSING = object()


def other_value(value: Any) -> Any:
    """Another value of a config's field that its checks may well allow; None if there is none."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value / 2 or 0.25
    return None


@promise(
    "tools",
    meaning="A field of the config is lost, or changed, between a model and its config.json.",
    usual_causes="an `__init__` that takes an argument without keeping it under the same name; a field computed from "
    "others each time; `to_dict` overridden.",
)
def config_keeps_every_field(subject: Subject) -> Finding:
    """Through a dictionary and through config.json, every field comes back, its default changed or not."""
    config = subject.make().config
    fields = {**{name: value for name, value in vars(config).items() if not name.startswith("_")}, **config.to_dict()}
    lost = lost_fields(fields, type(config).from_dict(fields)) | lost_fields(fields, saved_and_loaded(config))
    for name, value in fields.items():
        changed = {**fields, name: other_value(value)}
        if name in NOT_ONES_OWN or changed[name] is None:
            continue
        try:
            other = type(config).from_dict(changed)
        except (TypeError, ValueError):
            continue  # the class's own check does not want that value
        if other.to_dict().get(name) != changed[name]:
            lost.add(name)
    return at_most(len(lost), 0, ", ".join(sorted(lost)) or f"{len(fields)} fields")


def lost_fields(fields: dict[str, Any], config: PreTrainedConfig) -> set[str]:
    """Those of `fields` that `config` has otherwise."""
    there = config.to_dict()
    return {name for name, value in fields.items() if name not in NOT_ONES_OWN and there.get(name, MISSING) != value}


def saved_and_loaded(config: PreTrainedConfig) -> PreTrainedConfig:
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return type(config).from_pretrained(folder)


@promise(
    "tools",
    meaning="`get_input_embeddings` or `get_output_embeddings` is not the layer that embeds or scores tokens: "
    "resizing the vocabulary, PEFT, quantisation and tying go wrong.",
    usual_causes="names that transformers does not guess (`embed_tokens`, `lm_head`) and no getters of one's own; a "
    "wrapped model whose getters still are the inner one's.",
)
def embeddings_are_named(subject: Subject) -> Finding:
    """Their weights are (V, C); the one is given the ids, the scores of the other rank the tokens as the logits do."""
    model, ids = subject.make(), subject.ids(2, 16)
    embedding, head = input_embeddings(model), model.get_output_embeddings()
    if embedding is None or head is None:
        return holds(False, f"`get_input_embeddings` gives {embedding}, `get_output_embeddings` gives {head}")
    seen: dict[str, Tensor] = {}
    hooks = [
        embedding.register_forward_hook(lambda _, inputs, output: seen.update(ids=inputs[0])),
        head.register_forward_hook(lambda _, inputs, output: seen.update(scores=output)),
    ]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    faults = []
    if "ids" not in seen or not torch.equal(seen["ids"], ids):
        faults.append("the input embedding is not called with the ids")
    if "scores" not in seen or not torch.equal(seen["scores"][..., : logits.shape[-1]].argmax(-1), logits.argmax(-1)):
        faults.append("the output embedding's scores are not the logits'")
    model.set_input_embeddings(torch.nn.Embedding(*embedding.weight.shape))
    if model.get_input_embeddings() is embedding:
        faults.append("`set_input_embeddings` sets nothing")
    return at_most(len(faults), 0, "; ".join(faults) or f"{type(embedding).__name__}, {type(head).__name__}")


@promise(
    "tools",
    meaning="`pipeline('text-generation')` does not write with the model what its own `generate` writes.",
    usual_causes="`prepare_inputs_for_generation` overridden; a tokenizer that adds tokens of its own.",
)
def a_pipeline_writes_what_generate_writes(subject: Subject) -> Finding:
    """Greedy text by a pipeline is the decoded text of `generate`, on the ids that the tokenizer makes."""
    tokenizer = subject.tokenizer
    if tokenizer is None:
        return not_applicable("no tokenizer came with the model")
    model = subject.make(vocab_size=max(len(tokenizer), subject.vocab_size))
    prompt = "The way to the town"
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    settings = {"do_sample": False, "max_new_tokens": 8}
    written = model.generate(**encoded, **settings)[0, encoded["input_ids"].shape[1] :]
    expected = tokenizer.decode(written, skip_special_tokens=True)
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)(prompt, return_full_text=False, **settings)
    return holds(text[0]["generated_text"] == expected, "greedy text", text[0]["generated_text"], expected)
