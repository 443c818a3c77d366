"""What a nanoGPT checkpoint is part of: the characters in its data set's folder, and the run that resumes from it."""

import os
import pickle
import shutil

import pytest
import torch
from foreign import Canary, save_nanogpt

from hfgpt.data.tokenizer import encode_ids, load_tokenizer
from hfgpt.weights import load, save
from hfgpt.weights.convert import convert

CHARACTERS = "\n !abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def nanogpt(make_gpt2, tmp_path):
    """nanoGPT's folder after a run on characters, and a function that trains, so to speak, on a data set."""
    data = tmp_path / "nanoGPT/data/shakespeare_char"
    data.mkdir(parents=True)
    stoi = {character: number for number, character in enumerate(CHARACTERS)}
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(stoi), "stoi": stoi}))
    gpt2 = make_gpt2(activation_function="gelu", vocab_size=len(stoi))

    def run(dataset, out_dir="out-shakespeare-char"):
        file = tmp_path / "nanoGPT" / out_dir / "ckpt.pt"
        file.parent.mkdir(parents=True)
        save_nanogpt(gpt2, file)
        content = torch.load(file)
        torch.save(content | {"config": {"dataset": dataset, "out_dir": out_dir, "device": "cpu"}}, file)
        return file

    return run


@pytest.mark.parametrize("out_dir", ["out-shakespeare-char", ".", "runs/char/first"])
def test_characters_are_found_in_the_folder_of_the_data_set(nanogpt, tmp_path, out_dir):
    file = nanogpt("shakespeare_char", out_dir) if out_dir != "." else nanogpt("shakespeare_char")
    if out_dir == ".":
        file = shutil.move(file, tmp_path / "nanoGPT/ckpt.pt")

    [note] = convert(file, tmp_path / "out", "hfgpt").notes

    assert note == f"the tokenizer is that of {tmp_path / 'nanoGPT/data/shakespeare_char/meta.pkl'}."
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert encode_ids(tokenizer, ["to be!\n"]) == [[CHARACTERS.index(character) for character in "to be!\n"]]


def test_characters_are_found_from_where_one_is(nanogpt, tmp_path, monkeypatch):
    file = shutil.move(nanogpt("shakespeare_char"), tmp_path / "ckpt.pt")
    monkeypatch.chdir(tmp_path / "nanoGPT")

    assert "data/shakespeare_char/meta.pkl" in convert(file, tmp_path / "out", "gpt2").notes[0]


def test_characters_beside_the_checkpoint_come_first(nanogpt, tmp_path):
    file = nanogpt("shakespeare_char")
    (file.parent / "meta.pkl").write_bytes(pickle.dumps({"stoi": {"x": 0, "y": 1}}))

    convert(file, tmp_path / "out", "hfgpt")

    assert load_tokenizer(str(tmp_path / "out")).get_vocab() == {"x": 0, "y": 1}


@pytest.mark.parametrize("dataset", ["openwebtext", "../shakespeare_char", "/nowhere", "shakespeare_char/../../data/x"])
def test_characters_that_are_not_there_are_named_and_nothing_elsewhere_is_read(nanogpt, tmp_path, dataset):
    file = nanogpt(dataset)
    (tmp_path / "nanoGPT/shakespeare_char").mkdir()
    (tmp_path / "nanoGPT/shakespeare_char/meta.pkl").write_bytes(pickle.dumps({"stoi": {"x": 0}}))

    [note] = convert(file, tmp_path / "out", "hfgpt").notes

    assert note.startswith(f"no tokenizer goes along: the data set was {dataset!r}; give `--tokenizer`")
    assert not (tmp_path / "out/tokenizer.json").exists()


@pytest.mark.parametrize("dataset", [None, 3, ["x"], ""])
def test_a_data_set_without_a_name_is_no_obstacle(nanogpt, tmp_path, dataset):
    assert convert(nanogpt(dataset), tmp_path / "out", "hfgpt").notes == []


def test_characters_of_a_data_set_are_read_as_safely_as_those_beside(nanogpt, tmp_path):
    file = nanogpt("shakespeare_char")
    meta = tmp_path / "nanoGPT/data/shakespeare_char/meta.pkl"
    meta.write_bytes(pickle.dumps({"stoi": Canary(tmp_path / "sang")}))

    with pytest.raises(ValueError, match=r"meta\.pkl: .*it wants to run"):
        convert(file, tmp_path / "out", "hfgpt")

    assert not (tmp_path / "sang").exists()
    [note] = convert(file, tmp_path / "model.bin", "llm.c", nearest=True).notes
    assert note.startswith(f"the tokenizer stays behind, in {meta}")


@pytest.mark.parametrize("has_biases", [True, False])
def test_nanogpt_resumes_from_what_is_written_for_it(make_gpt2, tmp_path, has_biases):
    gpt2 = make_gpt2(activation_function="gelu")
    for name, parameter in gpt2.named_parameters():
        if name.endswith("bias") and not has_biases:
            parameter.data.zero_()
    gpt2.save_pretrained(tmp_path / "gpt2")
    save(load(tmp_path / "gpt2"), tmp_path / "ckpt.pt", "nanogpt")

    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)  # from here on as its train.py does
    assert checkpoint["iter_num"] == 0
    assert checkpoint["best_val_loss"] > 1e8
    assert checkpoint["model_args"]["bias"] == has_biases
    parameters = {name: torch.nn.Parameter(each) for name, each in checkpoint["model"].items() if "lm_head" not in name}
    decayed = [each for each in parameters.values() if each.dim() >= 2]
    others = [each for each in parameters.values() if each.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.8))
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    before = parameters["transformer.ln_f.weight"].clone()
    optimizer.step()
    assert torch.allclose(parameters["transformer.ln_f.weight"], before - 6e-4)
    assert os.path.getsize(tmp_path / "ckpt.pt") < 2 * os.path.getsize(tmp_path / "gpt2/model.safetensors")
