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
        for form in WRITERS:
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
        f"| there ↓ through → | {' | '.join(f'`{form}`' for form in WRITERS)} |",
        "|---" * (len(WRITERS) + 1) + "|",
    ]
    for form in WRITERS:
        cells = []
        for through in WRITERS:
            folder = tmp_path / f"{form} through {through}"
            folder.mkdir()
            cells.append(round_trip(form, through, sources, folder))
        lines.append(f"| `{form}` | {' | '.join(cells)} |")

    table = "\n".join(lines)

    assert table in README.read_text(encoding="utf-8"), f"the README's table should be:\n{table}"


@pytest.mark.parametrize("through", [form for form in WRITERS if form != "openai"])
def test_bf16_comes_back_as_bf16(make_gpt2, tmp_path, through):
    activation = ONLY_ACTIVATION.get(through, "gelu_new")
    make_gpt2(activation_function=activation).to(torch.bfloat16).save_pretrained(tmp_path / "gpt2")

    convert(tmp_path / "gpt2", tmp_path / "there", through)
    convert(tmp_path / "there", tmp_path / "again", "gpt2", heads=heads_of(through))

    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("gpt2", "again"))
    assert first.keys() == last.keys()
    assert all(torch.equal(last[name], each) and each.dtype == torch.bfloat16 for name, each in first.items())
