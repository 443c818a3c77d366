"""Code that travels with the weights, when it is not this hfgpt's: hfgpt says so, and puts its own in its place."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import hfgpt
import hfgpt.weights.remote_code
from hfgpt.evaluation.load_model import load_causal_lm
from hfgpt.generation.generator import load_generator
from hfgpt.modeling_hfgpt import AUTO_CLASSES, AUTO_MAP
from hfgpt.training.checkpoint import Manifest, TrainState, newest_checkpoint, save_checkpoint
from hfgpt.weights import load
from hfgpt.weights.convert import convert
from hfgpt.weights.remote_code import CodeUpdate, update_code

PACKAGE = Path(hfgpt.__file__).parent
CODE = {
    "arguments.py",
    "configuration_hfgpt.py",
    "gpt.py",
    "loss.py",
    "loss_triton.py",
    "modeling_hfgpt.py",
    "positions.py",
}
OLD = b"# of another day\n"
SHAPE = {"vocab_size": 320, "n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 2}

DOORS = {
    "weights.load": load,
    "causal_lm.load_causal_lm": lambda folder: load_causal_lm(str(folder)),
    "generation.load_generator": lambda folder: load_generator(str(folder)),
    "convert": lambda folder: convert(folder, folder.with_name("converted"), "gpt2"),
    "convert --verify": lambda folder: convert(folder, folder.with_name("converted"), "hfgpt", verify=True),
}


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A model with its tokenizer, saved by this hfgpt."""
    folder = tmp_path / "a model"
    hfgpt.HFGPTForCausalLM(hfgpt.HFGPTConfig(**SHAPE, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_stale(folder, *names):
    for name in names:
        (folder / name).write_bytes(OLD + (folder / name).read_bytes())


def state(folder):
    """Content and time of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def contents(folder):
    return {name: content for name, (content, _) in state(folder).items()}


# --- hfgpt says so


@pytest.mark.parametrize("door", DOORS)
def test_opening_a_folder_with_other_code_gives_one_line_with_the_command(folder, caplog, door):
    make_stale(folder, "gpt.py", "loss.py")

    DOORS[door](folder)

    (record,) = [record for record in caplog.records if record.name.startswith("hfgpt")]
    assert record.levelno == logging.WARNING
    assert "\n" not in record.message
    assert f"{folder}: its code (gpt.py, loss.py)" in record.message
    assert f"`hfgpt update-code '{folder}'`" in record.message


@pytest.mark.parametrize("door", DOORS)
def test_code_of_this_hfgpt_is_opened_without_a_word(folder, caplog, door):
    DOORS[door](folder)

    assert caplog.records == []


def test_a_code_file_that_is_gone_is_told_too(folder, caplog):
    (folder / "positions.py").unlink()

    load(folder)

    assert "its code (positions.py)" in caplog.text


def test_line_ends_that_git_changed_are_no_difference(folder, caplog):
    for name in CODE:
        (folder / name).write_bytes((folder / name).read_bytes().replace(b"\n", b"\r\n"))

    load(folder)

    assert caplog.records == []
    assert update_code(folder) == CodeUpdate([], None)


@pytest.mark.parametrize("auto_map", [None, {"AutoModelForCausalLM": "somebody/else--modeling_hfgpt.HFGPTForCausalLM"}])
def test_where_config_names_no_code_beside_it_none_is_looked_at(folder, caplog, auto_map):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    make_stale(folder, "gpt.py")

    load(folder)

    assert caplog.records == []


def test_of_several_processes_the_first_says_it(folder, caplog, monkeypatch):
    make_stale(folder, "gpt.py")
    monkeypatch.setenv("RANK", "1")

    load(folder)

    assert caplog.records == []


def test_a_command_says_it_on_stderr_in_one_line_and_works(folder):
    make_stale(folder, "gpt.py")
    command = [sys.executable, "-m", "hfgpt", "generate", str(folder), "The", "--max-new-tokens", "3", "--json"]

    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)}, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == "The"
    assert [line for line in done.stderr.splitlines() if "update-code" in line] == [
        line for line in done.stderr.splitlines() if line.startswith(f"{folder}: its code (gpt.py)")
    ]
    assert done.stderr.count("update-code") == 1


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_where_hfgpt_is_imported_its_own_code_runs_whatever_is_trusted(tmp_path, monkeypatch, auto_class):
    import transformers

    AUTO_CLASSES[auto_class](hfgpt.HFGPTConfig(**SHAPE)).save_pretrained(tmp_path)
    for name in CODE:
        (tmp_path / name).write_text("raise RuntimeError('the code of the folder ran')")

    model = getattr(transformers, auto_class).from_pretrained(tmp_path, trust_remote_code=True)

    assert type(model) is AUTO_CLASSES[auto_class]
    assert type(model.config) is hfgpt.HFGPTConfig


# --- hfgpt update-code


def finished_run(folder):
    (folder / "run.yaml").write_text("output_dir: out/demo\n")
    (folder / "results.json").write_text("{}")
    (folder / "checkpoint-2").mkdir()
    shutil.copyfile(folder / "gpt.py", folder / "checkpoint-2" / "gpt.py")
    return folder


def converted(folder):
    convert(folder, folder.with_name("as hfgpt"), "hfgpt")
    return folder.with_name("as hfgpt")


def checkpoint(folder):
    """One as a run writes it, but that its code was another from the start."""

    def write_model(place):
        shutil.copytree(folder, place, dirs_exist_ok=True)
        make_stale(place, "gpt.py", "modeling_hfgpt.py")

    manifest = Manifest(TrainState(step=4, tokens=40), {"tokenizer": "abc"}, val_loss=5.5)
    parameter = torch.nn.Parameter(torch.ones(3))
    states = {"optimizer": torch.optim.AdamW([parameter])}
    return save_checkpoint(folder.parent / "run", manifest, write_model, states, keep_last=1)


KINDS = {"run": finished_run, "converted": converted, "checkpoint": checkpoint}


@pytest.fixture(params=KINDS)
def stale(request, folder):
    """A folder of any kind whose gpt.py and modeling_hfgpt.py are not this hfgpt's."""
    stale = KINDS[request.param](folder)
    if request.param != "checkpoint":
        make_stale(stale, "gpt.py", "modeling_hfgpt.py")
    return stale


def test_the_code_is_replaced_and_all_else_stays_to_the_byte_and_the_second(stale, caplog):
    before = state(stale)

    updated = update_code(stale)

    after = state(stale)
    assert updated == CodeUpdate(["gpt.py", "modeling_hfgpt.py"], stale / "replaced-code-1")
    for name in CODE:
        assert after.pop(name)[0] == (PACKAGE / name).read_bytes()
    for name in updated.replaced:
        assert after.pop(f"replaced-code-1/{name}")[0] == before[name][0]
    after.pop("manifest.json", None)
    assert after == {name: each for name, each in before.items() if name not in {*CODE, "manifest.json"}}
    load(stale)
    assert caplog.records == []


def test_the_manifest_of_a_checkpoint_follows(folder, tmp_path):
    saved = checkpoint(folder)
    manifest = json.loads((saved / "manifest.json").read_text())

    update_code(saved)

    said = []
    assert newest_checkpoint(tmp_path / "run", said.append) == saved
    assert said == []
    renewed = json.loads((saved / "manifest.json").read_text())
    changed = {name for name in manifest["files"] if manifest["files"][name] != renewed["files"][name]}
    assert changed == {"gpt.py", "modeling_hfgpt.py"}
    unlike = {"files", "sha256"}
    assert {key: renewed[key] for key in renewed.keys() - unlike} == {
        key: manifest[key] for key in manifest.keys() - unlike
    }


def test_current_code_is_left_alone(folder):
    before = state(folder)

    assert update_code(folder) == CodeUpdate([], None)

    assert state(folder) == before


def test_what_was_replaced_earlier_is_kept_too(folder):
    for text in ("# one\n", "# two\n"):
        (folder / "gpt.py").write_text(text)
        update_code(folder)

    assert (folder / "replaced-code-1" / "gpt.py").read_text() == "# one\n"
    assert (folder / "replaced-code-2" / "gpt.py").read_text() == "# two\n"


@pytest.mark.parametrize(
    "auto_map", [None, {"AutoConfig": AUTO_MAP["AutoConfig"], "AutoModel": "somebody/else--modeling_hfgpt.HFGPTModel"}]
)
def test_classes_that_config_does_not_name_are_named(folder, auto_map):
    wanted = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**wanted, "auto_map": auto_map}))
    for name in CODE:
        (folder / name).unlink()

    updated = update_code(folder)

    assert {*updated.replaced} == {*CODE, "config.json"}
    assert json.loads((folder / "config.json").read_text()) == wanted
    assert [path.name for path in updated.kept_in.iterdir()] == ["config.json"]
    assert {name for name in contents(folder) if name.endswith(".py")} == CODE


@pytest.mark.parametrize("moment", range(4))  # the manifest, two files of code and config.json are written
def test_a_kill_at_any_moment_loses_nothing_and_the_same_again_does_the_rest(folder, tmp_path, monkeypatch, moment):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": None}))
    saved = checkpoint(folder)
    before = contents(saved)
    writes = []
    write = hfgpt.weights.remote_code.write_atomically

    def die(path, content):
        if len(writes) == moment:
            raise KeyboardInterrupt
        writes.append(path.name)
        write(path, content)

    monkeypatch.setattr(hfgpt.weights.remote_code, "write_atomically", die)
    with pytest.raises(KeyboardInterrupt):
        update_code(saved)
    monkeypatch.setattr(hfgpt.weights.remote_code, "write_atomically", write)

    update_code(saved)

    assert newest_checkpoint(tmp_path / "run", pytest.fail) == saved
    after = contents(saved)
    assert all(after[name] == (PACKAGE / name).read_bytes() for name in CODE)
    kept = {(Path(name).name, content) for name, content in after.items() if name.startswith("replaced-code-")}
    assert {(name, before[name]) for name in ("config.json", "gpt.py", "modeling_hfgpt.py")} <= kept
    assert json.loads(after["config.json"]) == config


def damage(folder, how):
    config = json.loads((folder / "config.json").read_text())
    if how == "gpt2":
        shutil.rmtree(folder)
        GPT2LMHeadModel(GPT2Config(**SHAPE, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "no folder":
        shutil.rmtree(folder)
    elif how == "broken config":
        (folder / "config.json").write_text("{")
    elif how == "broken auto_map":
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": "x"}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("gpt2", "holds no hfgpt model: the `model_type` of its config.json is 'gpt2'"),
        ("no config", "is no model folder: it has no config.json"),
        ("no folder", "is no folder"),
        ("broken config", "config.json is damaged"),
        ("broken auto_map", "`auto_map` must hold an object, got 'x'"),
    ],
)
def test_a_folder_that_is_no_hfgpt_model_is_refused_in_one_line_and_left_alone(folder, how, message):
    make_stale(folder, "gpt.py")
    damage(folder, how)
    before = state(folder)

    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        update_code(folder)

    assert str(folder) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert state(folder) == before


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_a_checkpoint_that_was_changed_is_not_made_to_look_whole(folder, name):
    saved = checkpoint(folder)
    (saved / name).write_text((saved / name).read_text().replace("4", "5", 1))
    before = state(saved)

    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        update_code(saved)

    assert state(saved) == before
