"""Promises about one training step: the same gradients however they are computed, and one for every parameter."""

from collections import Counter
from typing import Any

import torch
from torch import nn

from hfgpt.check.learning import (
    ROUNDING,
    learn,
    ragged_labels,
    relative_distance,
    set_dropout,
    worst_tensor,
)
from hfgpt.check.promise import Finding, at_most, holds, not_applicable, promise
from hfgpt.check.promises.loss import follows_from
from hfgpt.check.small import size_of
from hfgpt.check.subject import Subject

DROPOUT = 0.2


@promise(
    "training",
    meaning="The same seed, data and weights give another model each time.",
    usual_causes="random numbers from elsewhere than torch's generators; a state kept between forward passes.",
)
def training_is_repeatable(subject: Subject) -> Finding:
    """Three steps of AdamW with dropout on, done twice from one seed, leave bit-equal weights."""

    def train() -> dict[str, torch.Tensor]:
        model, ids = set_dropout(subject.make(), DROPOUT).train(), subject.ids(4, 16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(1)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: each.detach() for name, each in model.named_parameters()}

    first, second = train(), train()
    return at_most(relative_distance(second, first), 0, f"most in {worst_tensor(second, first)}")


def masked_batch(subject: Subject) -> dict[str, Any]:
    """A batch with labels and a mask with a hole, on which all that stands after it depends."""
    ids = subject.ids(3, 20)
    mask = torch.ones_like(ids)
    mask[:, 5:9] = 0
    labels = ragged_labels(ids).masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}


def count_calls(model: nn.Module) -> Counter[str]:
    """How often each module of `model` is called from now on, by its name."""
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, __, name=name: calls.update([name]))
    return calls


@promise(
    "training",
    meaning="With gradient checkpointing the model learns something else than without.",
    usual_causes="a block called without all its arguments when it is checkpointed (mask, positions); "
    "`preserve_rng_state=False`, so that dropout differs the second time; a cache filled twice.",
)
def checkpointing_is_exact(subject: Subject) -> Finding:
    """Every gradient is bit-equal with and without checkpointing, in both of torch's ways, with dropout on."""
    if broken := follows_from(subject, training_is_repeatable):
        return broken
    model, batch = set_dropout(subject.make(), DROPOUT).train(), masked_batch(subject)
    if not model.supports_gradient_checkpointing:
        return not_applicable("the class says `supports_gradient_checkpointing = False`")
    expected = learn(model, batch)
    calls = count_calls(model)
    learn(model, batch)
    once = Counter(calls)
    for reentrant in (False, True):
        calls.clear()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        got = learn(model, batch)
        if all(calls[name] <= times for name, times in once.items()):
            return holds(False, f"nothing is computed a second time in the backward pass (use_reentrant={reentrant})")
        distance = relative_distance(got, expected)
        if distance > 0:
            return at_most(distance, 0, f"most in {worst_tensor(got, expected)} (use_reentrant={reentrant})")
    return at_most(0, 0, "with use_reentrant False and True")


@promise(
    "training",
    meaning="torch.compile cannot take the training step as one graph: it is slow, or fails with `fullgraph=True`.",
    usual_causes="Python that reads a tensor's value (`if mask.all()`, `.item()`, `print`); a library call that dynamo "
    "does not know.",
)
def compiled_step_is_one_graph(subject: Subject) -> Finding:
    """The forward pass with its loss has no graph break."""
    model, batch = set_dropout(subject.make(), 0).train(), masked_batch(subject)
    torch._dynamo.reset()
    try:
        torch.compile(model, fullgraph=True, backend="eager", dynamic=False)(**batch)
    except torch._dynamo.exc.TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        places = [line for line in lines if line.startswith("File ")]
        return holds(False, f"graph break: {lines[0]}; {places[-1] if places else 'place unknown'}")
    finally:
        torch._dynamo.reset()
    return holds(True, "no graph break")


@promise(
    "training",
    meaning="The compiled model learns something else than the model as written.",
    usual_causes="an autograd.Function whose backward is right only as it runs in eager mode; a branch on "
    "`torch.compiler.is_compiling()`; tensors changed in place.",
)
def compiled_gradients_are_eager(subject: Subject) -> Finding:
    """Gradients of the step as torch.compile traces it (backend aot_eager: forward and backward) are eager's."""
    if broken := follows_from(subject, training_is_repeatable):
        return broken
    model, batch = set_dropout(subject.make(), 0).train(), masked_batch(subject)
    expected = learn(model, batch)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", dynamic=False)
    got = learn(compiled, batch)
    torch._dynamo.reset()
    return at_most(relative_distance(got, expected), ROUNDING, f"most in {worst_tensor(got, expected)}")


@promise(
    "training",
    meaning="Under bf16 autocast gradients are not finite, or far from those of fp32.",
    usual_causes="a softmax, a norm or a loss computed in bf16; fp16 constants or casts written out; "
    "`torch.finfo(...).min` added twice.",
)
def bf16_autocast_learns_alike(subject: Subject) -> Finding:
    """Gradients under `torch.autocast(bfloat16)` are finite, in the parameters' dtype, and near those of fp32."""
    if broken := follows_from(subject, training_is_repeatable):
        return broken
    model, batch = set_dropout(subject.make(), 0).train(), masked_batch(subject)
    expected = learn(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = learn(model, batch)
    infinite = [name for name, gradient in got.items() if not gradient.isfinite().all()]
    if infinite:
        return holds(False, f"gradients that are not finite: {', '.join(infinite[:3])} ({len(infinite)} in all)")
    # bf16 rounds to 2^-9; some twenty roundings a block stand one after another, and may all point the same way.
    bound = 20 * 2**-8 * max(1, size_of(subject.config, "num_hidden_layers", 2) / 2)
    return at_most(relative_distance(got, expected), bound, f"most in {worst_tensor(got, expected)}")


@promise(
    "training",
    meaning="A parameter gets no gradient: it never learns, and DDP stops with `find_unused_parameters`.",
    usual_causes="a layer that `forward` does not call; `.detach()`, `.data` or `torch.no_grad()` on the way; "
    "a weight re-made in `forward`.",
)
def every_parameter_learns(subject: Subject) -> Finding:
    """After one backward pass every parameter that asks for a gradient has one, and matrices have one that is not 0."""
    model, ids = set_dropout(subject.make(), 0).train(), subject.ids(4, 20)
    gradients = learn(model, {"input_ids": ids, "labels": ids})
    asked = {name: each for name, each in model.named_parameters() if each.requires_grad}
    # A vector's may be 0 by mathematics: a key's bias shifts all scores of a row alike.
    idle = [
        name for name, each in asked.items() if name not in gradients or (each.ndim > 1 and not gradients[name].any())
    ]
    return at_most(len(idle), 0, ", ".join(idle) or f"{len(asked)} parameters")
