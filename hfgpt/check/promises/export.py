"""Promises about what runs a model elsewhere: torch.export, ONNX, devices that hold a part each, and pipelines."""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfgpt.check.promise import Finding, close, holds, not_applicable, promise
from hfgpt.check.subject import Subject


class LogitsOnly(nn.Module):
    """Ids and mask to logits: what an exported program takes and gives."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def padded_inputs(subject: Subject, rows: int, length: int) -> dict[str, Tensor]:
    """Ids and a mask (B, T) with padding on the right of the last row."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[-1, length - 3 :] = 0
    return {"input_ids": subject.ids(rows, length), "attention_mask": mask}


@promise(
    "tools",
    meaning="torch.export cannot write the model as one program for every batch and length.",
    usual_causes="Python that reads a tensor's value or size (`if T > 128`, `int(x.max())`); sizes kept as numbers "
    "from the example; a mask made in NumPy.",
)
def export_takes_any_size(subject: Subject) -> Finding:
    """The program that torch.export makes of one batch gives the model's logits for a batch of another size."""
    model, inputs = LogitsOnly(subject.make()).eval(), padded_inputs(subject, 3, 12)
    other = padded_inputs(subject, 2, 19)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, sizes), strict=False)
        got = program.module()(**other)
        expected = model(**other)
    shown = other["attention_mask"] == 1
    return close(got[shown], expected[shown], "logits of another batch and length")


@promise(
    "tools",
    meaning="The model cannot be written as ONNX, or onnxruntime computes something else.",
    usual_causes="the same as for torch.export; operators that ONNX does not have (complex numbers, unusual indexing).",
)
def onnx_takes_any_size(subject: Subject) -> Finding:
    """The ONNX file that torch writes gives the model's logits in onnxruntime, for a batch of another size."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        return not_applicable(f"{' and '.join(missing)} not installed")
    import onnxruntime

    model, inputs = LogitsOnly(subject.make()).eval(), padded_inputs(subject, 3, 12)
    other = padded_inputs(subject, 2, 19)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad(), TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.onnx")
        torch.onnx.export(
            model, (), file, kwargs=inputs, dynamic_shapes=dict.fromkeys(inputs, sizes), dynamo=True, verbose=False
        )
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        got = torch.from_numpy(session.run(None, {name: each.numpy() for name, each in other.items()})[0])
        expected = model(**other)
    shown = other["attention_mask"] == 1
    return close(got[shown], expected[shown], "logits of another batch and length")


@promise(
    "tools",
    meaning='`device_map="auto"` cuts a block in two where its inputs are added again, or fails.',
    usual_causes="`_no_split_modules` missing, or a class name in it that no module has (renamed, or copied from "
    "another model).",
)
def blocks_stay_on_one_device(subject: Subject) -> Finding:
    """`_no_split_modules` names classes of the model; with some on the disk the logits are the same."""
    model, ids = subject.make(), subject.ids(2, 16)
    classes = {type(module).__name__ for module in model.modules()}
    declared = {*(model._no_split_modules or [])}
    if not declared & classes:
        return holds(False, f"`_no_split_modules` is {sorted(declared)}; no module of the model is one of them")
    places = alternate_places(model, declared)
    with torch.no_grad(), TemporaryDirectory() as folder:
        expected = model(input_ids=ids).logits
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, device_map=places, offload_folder=f"{folder}/disk").eval()
        got = loaded(input_ids=ids).logits
    on_disk = [name for name, place in places.items() if place == "disk"]
    return close(got, expected, f"on the disk: {', '.join(on_disk) or 'nothing'}")


def alternate_places(model: PreTrainedModel, blocks: set[str]) -> dict[str, str]:
    """A device map with every second module of the classes `blocks` on the disk and all else on the CPU."""
    found = [name for name, module in model.named_modules() if type(module).__name__ in blocks]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    places = {name: ("cpu", "disk")[number % 2] for number, name in enumerate(outer)}
    for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if not any(name.startswith(f"{block}.") for block in outer):
            places[name.rpartition(".")[0] or name] = "cpu"
    return places
