"""Tensors inside modules that stand around a model or its blocks: DDP, compile, FSDP, Lightning, in every format."""

import re

import pytest
import torch
from foreign import as_linear, from_scratch, save_nanogpt
from safetensors.torch import load_file, save_file

from hfgpt.weights import load
from hfgpt.weights.convert import convert

FSDP = "_fsdp_wrapped_module."
AROUND = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", FSDP, "model.", "net.gpt."]


def around_all(prefix):
    return lambda name: prefix + name


def around_each_block(name):
    """FSDP around the model and each block, with activation checkpoints inside and compiled MLPs."""
    name = re.sub(r"(\b(?:h|layers|trf_blocks)\.\d+\.)", rf"\1{FSDP}_checkpoint_wrapped_module.", name)
    return FSDP + name.replace("mlp.", "mlp._orig_mod.").replace("ff.layers.", "ff._orig_mod.layers.")


WRAPPINGS = {**{prefix: around_all(prefix) for prefix in AROUND}, "each block": around_each_block}


def rename(tensors, wrapping):
    return {WRAPPINGS[wrapping](name): each for name, each in tensors.items()}


@pytest.fixture
def gpt2(make_gpt2):
    return make_gpt2()


@pytest.fixture
def ids():
    return torch.randint(320, (3, 20), generator=torch.Generator().manual_seed(0))


def convert_and_check(source, gpt2, ids, folder, **settings):
    """What was noted of a conversion whose result is this GPT-2, and is verified."""
    result = convert(source, folder / "out", "hfgpt", verify=True, **settings)
    assert result.comparison.passed
    torch.testing.assert_close(load(folder / "out")(ids).logits, gpt2(ids).logits, rtol=0, atol=2e-5)
    [note] = [note for note in result.notes if note.startswith("taken off the names of the tensors: ")]
    return note


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("form", ["gpt2", "gpt2 without a head", "hfgpt"])
def test_a_folder_of_transformers_is_read_within_its_wrappers(gpt2, tmp_path, ids, wrapping, form):
    (gpt2.transformer if "without" in form else gpt2).save_pretrained(tmp_path / "gpt2")
    folder = tmp_path / "gpt2"
    if form == "hfgpt":
        folder = tmp_path / "hfgpt"
        convert(tmp_path / "gpt2", folder, "hfgpt")
    tensors = rename(load_file(folder / "model.safetensors"), wrapping)
    (folder / "model.safetensors").unlink()
    if form == "gpt2":
        torch.save({"state_dict": tensors, "epoch": 3}, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    note = convert_and_check(folder, gpt2, ids, tmp_path)

    assert (FSDP if wrapping == "each block" else wrapping.split(".")[0]) in note


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("container", [None, "model_state_dict", "state_dict", "module"])
def test_a_file_of_the_books_is_read_within_its_wrappers(gpt2, tmp_path, ids, wrapping, container):
    tensors = rename(from_scratch(gpt2, fast=container == "module"), wrapping)
    torch.save({container: tensors, "epoch": 3} if container else tensors, tmp_path / "model.pth")

    convert_and_check(tmp_path / "model.pth", gpt2, ids, tmp_path, heads=4)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_files_of_nanogpt_and_mingpt_are_read_within_their_wrappers(make_gpt2, tmp_path, ids, wrapping):
    gpt2 = make_gpt2(activation_function="gelu")
    save_nanogpt(gpt2, tmp_path / "ckpt.pt")
    content = torch.load(tmp_path / "ckpt.pt")
    torch.save(content | {"model": rename(content["model"], wrapping)}, tmp_path / "ckpt.pt")
    torch.save({"state_dict": rename(as_linear(gpt2), wrapping)}, tmp_path / "mingpt.pt")

    convert_and_check(tmp_path / "ckpt.pt", gpt2, ids, tmp_path, activation="gelu")
    (tmp_path / "again").mkdir()
    convert_and_check(tmp_path / "mingpt.pt", gpt2, ids, tmp_path / "again", activation="gelu", heads=4)


def test_names_without_wrappers_are_left_alone_and_nothing_is_said(gpt2, tmp_path):
    gpt2.save_pretrained(tmp_path / "gpt2")
    convert(tmp_path / "gpt2", tmp_path / "hfgpt", "hfgpt")

    assert convert(tmp_path / "hfgpt", tmp_path / "again", "gpt2").notes == []


@pytest.mark.parametrize("other", ["teacher.", "module."])
def test_two_models_in_one_file_are_refused_by_name(gpt2, tmp_path, other):
    tensors = from_scratch(gpt2)
    torch.save(tensors | {other + name: each + 1 for name, each in tensors.items()}, tmp_path / "model.pth")

    with pytest.raises(ValueError, match=r"model\.pth: (teacher\.\S+: left over|\S+: in the file more than once)"):
        convert(tmp_path / "model.pth", tmp_path / "out", "hfgpt", heads=4)
    assert not (tmp_path / "out").exists()
