"""From each format through each other one and back: the table in hfgpt/weights/README.md is what comes out here."""

import os
from pathlib import Path

import pytest
import torch
from foreign import from_scratch, llmc_bytes, save_nanogpt
from safetensors.torch import load_file

from hfgpt.weights import WRITERS
from hfgpt.weights.convert import ONLY_ACTIVATION, convert
from hfgpt.weights.formats.openai import DATA, INDEX

README = Path(__file__).parents[2] / "hfgpt" / "weights" / "README.md"
FORMATS = [form for form in WRITERS if form != "nanochat"]  # which holds another network
NAMES = {"nanogpt": "ckpt.pt", "llms-from-scratch": "model.pth", "llm.c": "model.bin"}  # the others are folders


def heads_of(form):
    return 4 if form == "llms-from-scratch" else None


@pytest.fixture
def sources(make_gpt2, tmp_path):
    """Where a random GPT-2 lies in each format, by each activation; mostly put there by hand."""
    places = {}
    for activation in ("gelu", "gelu_new"):
        folder = tmp_path / activation
        folder.mkdir()
        gpt2 = make_gpt2(activation_function=activation)
        gpt2.save_pretrained(folder / "gpt2")
        convert(folder / "gpt2", folder / "hfgpt", "hfgpt")
        for form in FORMATS:
            place = places[form, activation] = folder / NAMES.get(form, form)
            if form == "nanogpt":
                save_nanogpt(gpt2, place)
            elif form == "llms-from-scratch":
                torch.save(from_scratch(gpt2), place)
            elif form == "llm.c":
                place.write_bytes(llmc_bytes(gpt2))
            elif form == "openai" and activation == "gelu_new":
                convert(folder / "gpt2", place, "openai")
    return places


def content(form, place):
    """Names and bytes of the tensors, read without hfgpt."""
    if form == "llm.c":
        return {"": place.read_bytes()}
    if form == "openai":
        return {name: (place / name).read_bytes() for name in (INDEX, DATA)}
    tensors = torch.load(place) if place.is_file() else load_file(place / "model.safetensors")
    tensors = tensors.get("model", tensors)
    return {name: (each.dtype, each.shape, each.contiguous().numpy().tobytes()) for name, each in tensors.items()}


def round_trip(form, through, sources, folder):
    """What a table cell says of this way there and back."""
    activation = ONLY_ACTIVATION.get(form) or ONLY_ACTIVATION.get(through, "gelu_new")
    source, there, again = sources[form, activation], folder / NAMES.get(through, "there"), folder / f"again.{form}"
    is_nearest = ONLY_ACTIVATION.get(through, activation) != activation
    if is_nearest:
        with pytest.raises(ValueError, match="Take it with `--nearest`"):
            convert(source, there, through, heads=heads_of(form))
    convert(source, there, through, heads=heads_of(form), nearest=is_nearest)
    convert(there, again, form, heads=heads_of(through), nearest=is_nearest)
    if content(form, source) != content(form, again):
        return "**other bits**"
    return "✔ `--nearest`" if is_nearest else "✔"


def test_the_readmes_table_of_round_trips_is_what_comes_out(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # seconds of waiting for the disk, 72 times
    lines = [
        f"| there ↓ through → | {' | '.join(f'`{form}`' for form in FORMATS)} |",
        "|---" * (len(FORMATS) + 1) + "|",
    ]
    for form in FORMATS:
        cells = []
        for through in FORMATS:
            folder = tmp_path / f"{form} through {through}"
            folder.mkdir()
            cells.append(round_trip(form, through, sources, folder))
        lines.append(f"| `{form}` | {' | '.join(cells)} |")

    table = "\n".join(lines)

    assert table in README.read_text(encoding="utf-8"), f"the README's table should be:\n{table}"


@pytest.mark.parametrize("through", [form for form in FORMATS if form != "openai"])
def test_bf16_comes_back_as_bf16(make_gpt2, tmp_path, through):
    activation = ONLY_ACTIVATION.get(through, "gelu_new")
    make_gpt2(activation_function=activation).to(torch.bfloat16).save_pretrained(tmp_path / "gpt2")

    convert(tmp_path / "gpt2", tmp_path / "there", through)
    convert(tmp_path / "there", tmp_path / "again", "gpt2", heads=heads_of(through))

    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("gpt2", "again"))
    assert first.keys() == last.keys()
    assert all(torch.equal(last[name], each) and each.dtype == torch.bfloat16 for name, each in first.items())


def without_biases(gpt2, *names):
    """The same GPT-2 with zeros for all biases of these layers, which a file may then leave out."""
    for name, parameter in gpt2.named_parameters():
        if name.endswith(tuple(f"{each}.bias" if each else ".bias" for each in names)):
            parameter.data.zero_()
    return gpt2


@pytest.mark.parametrize("through", ["hfgpt", "gpt2", "llms-from-scratch", "llm.c", "openai"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_book_model_without_qkv_biases_comes_back_without(make_gpt2, tmp_path, through, tied):
    if not tied and through in ("llm.c", "openai"):
        pytest.skip("the format has no output layer of its own")
    gpt2 = without_biases(make_gpt2(tie_word_embeddings=tied), "c_attn")
    torch.save(from_scratch(gpt2, qkv_bias=False), tmp_path / "model.pth")

    convert(tmp_path / "model.pth", tmp_path / "there", through, heads=4)
    convert(tmp_path / "there", tmp_path / "again.pth", "llms-from-scratch", heads=heads_of(through), verify=True)

    assert content("llms-from-scratch", tmp_path / "again.pth") == content("llms-from-scratch", tmp_path / "model.pth")


@pytest.mark.parametrize("layer", [0, 1])
def test_biases_stay_where_one_of_them_is_not_zero(make_gpt2, tmp_path, layer):
    gpt2 = without_biases(make_gpt2(), "c_attn")
    gpt2.transformer.h[layer].attn.c_attn.bias.data[40] = 1e-3
    torch.save(from_scratch(gpt2), tmp_path / "model.pth")

    convert(tmp_path / "model.pth", tmp_path / "there", "hfgpt", heads=4)
    convert(tmp_path / "there", tmp_path / "again.pth", "llms-from-scratch")

    assert content("llms-from-scratch", tmp_path / "again.pth") == content("llms-from-scratch", tmp_path / "model.pth")


@pytest.mark.parametrize("through", [form for form in FORMATS if form not in ("gpt2", "hfgpt")])
def test_a_nanogpt_without_biases_comes_back_without(make_gpt2, tmp_path, through):
    gpt2 = without_biases(make_gpt2(activation_function="gelu"), "")
    save_nanogpt(gpt2, tmp_path / "ckpt.pt", leave_out=["bias"])
    is_nearest = ONLY_ACTIVATION[through] == "gelu_new"

    convert(tmp_path / "ckpt.pt", tmp_path / "there", through, nearest=is_nearest)
    convert(tmp_path / "there", tmp_path / "again.pt", "nanogpt", heads=heads_of(through), nearest=is_nearest)

    assert content("nanogpt", tmp_path / "again.pt") == content("nanogpt", tmp_path / "ckpt.pt")
    assert torch.load(tmp_path / "again.pt")["model_args"]["bias"] is False
