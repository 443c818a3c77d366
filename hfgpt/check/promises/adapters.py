"""Promises about PEFT: adapters find the model's layers, are saved and loaded, and merge into its weights."""

from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from hfgpt.check.learning import gradients_of
from hfgpt.check.promise import Finding, at_most, close, holds, max_difference, not_applicable, promise
from hfgpt.check.subject import Subject


def adapt(model: PreTrainedModel) -> tuple[Any, str]:
    """The model with a random LoRA on the layers that PEFT chooses, or else on all linear ones; and which of both."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False}
    try:
        return get_peft_model(model, LoraConfig(**settings)), "PEFT's default layers"
    except ValueError as error:  # it has no default for this model_type
        if "target_modules" not in str(error):
            raise
        return get_peft_model(
            model, LoraConfig(**settings, target_modules="all-linear")
        ), "`target_modules='all-linear'`"


@promise(
    "tools",
    meaning="A LoRA has nothing to adapt, or does not learn.",
    usual_causes="matrices as bare `nn.Parameter`s instead of `nn.Linear` or transformers' `Conv1D`; layers whose "
    "weight is read (`F.linear(x, layer.weight)`) instead of being called.",
)
def peft_finds_layers(subject: Subject) -> Finding:
    """LoRA's factors change the logits, are all that asks for a gradient, and each of them gets one."""
    if find_spec("peft") is None:
        return not_applicable("peft is not installed")
    model, ids = subject.make(), subject.ids(3, 16)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    try:
        adapted, layers = adapt(model)
    except ValueError as error:
        return holds(False, f"PEFT finds no layer: {error}")
    output = adapted(input_ids=ids, labels=ids)
    output.loss.backward()
    asked = [name for name, each in adapted.named_parameters() if each.requires_grad]
    idle = [name for name in asked if name not in gradients_of(adapted) or not gradients_of(adapted)[name].any()]
    if torch.equal(output.logits, plain):
        return holds(False, f"adapted layers change nothing ({layers})")
    if not all("lora_" in name for name in asked):
        return holds(False, "parameters of the model itself ask for a gradient")
    kinds = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in asked})
    return at_most(len(idle), 0, ", ".join(idle) or f"{layers}: {', '.join(kinds)}")


def no_adapter(subject: Subject) -> Finding | None:
    """That an adapter cannot be tried: there is no PEFT, or nothing that it adapts; None if it can."""
    if find_spec("peft") is None:
        return not_applicable("peft is not installed")
    try:
        adapt(subject.make())
    except ValueError:
        return not_applicable("it rests on peft-finds-layers, which is broken")
    return None


@promise(
    "tools",
    meaning="An adapter that was saved and loaded onto the same weights gives other logits.",
    usual_causes="names that change between saving and loading; a `state_dict` of one's own.",
)
def peft_adapter_is_saved(subject: Subject) -> Finding:
    """The adapter's folder, loaded onto the same base, gives the same logits to the last bit."""
    if broken := no_adapter(subject):
        return broken
    from peft import PeftModel

    ids = subject.ids(3, 16)
    with torch.no_grad(), TemporaryDirectory() as folder:
        adapted = adapt(subject.make())[0].eval()
        expected = adapted(input_ids=ids).logits
        adapted.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(subject.make(), folder).eval()
        got = loaded(input_ids=ids).logits
    return at_most(max_difference(got, expected), 0, "logits with the loaded adapter")


@promise(
    "tools",
    meaning="Merging an adapter into the weights changes what the model says.",
    usual_causes="an adapted matrix that is also used elsewhere: an output layer tied to the embedding, which "
    "`get_output_embeddings` does not name; weights shared between layers.",
)
def peft_merge_is_exact(subject: Subject) -> Finding:
    """Merged, the model is of its own class again, as tied as before, with the logits of the adapted one."""
    if broken := no_adapter(subject):
        return broken
    model, ids = subject.make(), subject.ids(3, 16)
    shared = shared_parameters(model)
    with torch.no_grad():
        adapted = adapt(model)[0].eval()
        expected = adapted(input_ids=ids).logits
        merged = adapted.merge_and_unload()
        got = merged(input_ids=ids).logits
    if type(merged) is not type(subject.make()):
        return holds(False, f"merged, it is a {type(merged).__name__}")
    if shared_parameters(merged) != shared:
        return holds(False, f"tied before: {sorted(shared)}; after merging: {sorted(shared_parameters(merged))}")
    return close(got, expected, "logits after merging")


def shared_parameters(model: torch.nn.Module) -> set[tuple[str, ...]]:
    """The names under which one and the same parameter is found, where there are several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {tuple(each) for each in names.values() if len(each) > 1}
