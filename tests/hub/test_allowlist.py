"""What may leave this machine, and what is refused before the Hub is asked anything."""

import json
import re
import shutil
from pathlib import Path

import pytest
from hub_client import TOKEN
from hub_models import KEPT, SENT, save_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import hfgpt.gpt
import hfgpt.modeling_hfgpt
from hfgpt import HFGPTConfig
from hfgpt.config.loading import load_config
from hfgpt.hub.allowlist import plan_push
from hfgpt.training.checkpoint import Manifest, TrainState, save_checkpoint
from hfgpt.weights.remote_code import update_code


def test_what_stays_is_named_with_its_reason(run):
    plan = plan_push(run)

    assert {*plan.files} == SENT
    assert plan.skipped == {
        ".env": "secrets",
        ".lock": "lock",
        "checkpoint-2": "checkpoint",
        "notes.txt": "not on the list",
        "optimizer.pt": "optimizer state",
        "secrets.py": "not on the list",
        "training_args.bin": "pickle that holds the Hub's token and paths of this machine",
    }
    assert {*plan.skipped} == KEPT
    assert plan.size("checkpoint-2") == len(TOKEN)
    assert plan.size("model.safetensors") == (run / "model.safetensors").stat().st_size


def test_results_of_evaluations_go(run):
    (run / ".eval_results").mkdir()
    (run / ".eval_results" / "own.yaml").write_text("- value: 1.0\n")
    (run / ".eval_results" / "notes.txt").write_text("mine")

    plan = plan_push(run)

    assert ".eval_results/own.yaml" in plan.files
    assert plan.skipped[".eval_results/notes.txt"] == "not on the list"


def test_the_code_that_goes_is_what_config_names_and_imports(run):
    """So a model with code of its own goes with that, and a file beside it does not."""
    (run / "modeling_hfgpt.py").write_text("from .mine import x\n" + (run / "modeling_hfgpt.py").read_text())
    (run / "mine.py").write_text("x = 1\n")

    assert "mine.py" in plan_push(run, own_code=True).files
    (run / "mine.py").unlink()
    with pytest.raises(ValueError, match=r"mine\.py is missing: config\.json and its code name it"):
        plan_push(run)


def test_code_that_is_not_this_hfgpts_does_not_go_unasked(run):
    (run / "gpt.py").write_text("# of another day\n" + (run / "gpt.py").read_text())

    with pytest.raises(ValueError, match=rf"its code \(gpt\.py\).*`hfgpt update-code {run}`.*Nothing was pushed"):
        plan_push(run)
    update_code(run)

    plan = plan_push(run)
    assert plan.files["gpt.py"].read_bytes() == Path(hfgpt.gpt.__file__).read_bytes()
    assert plan.skipped["replaced-code-1"] == "code from before `hfgpt update-code`"


@pytest.mark.parametrize("auto_class", sorted(hfgpt.modeling_hfgpt.AUTO_CLASSES))
def test_every_class_of_model_may_go(tmp_path, auto_class):
    model_class = hfgpt.modeling_hfgpt.AUTO_CLASSES[auto_class]
    model_class(HFGPTConfig(vocab_size=11, n_embd=8, n_head=2, n_layer=1)).save_pretrained(tmp_path)

    assert "model.safetensors" in plan_push(tmp_path).files


def test_a_gpt2_goes_without_code(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_head=2, n_layer=1)).save_pretrained(tmp_path)

    assert {*plan_push(tmp_path).files} == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("README.md", f"Log in with {TOKEN}.\n", "a token"),
        ("samples.md", "The key is ghp_" + "a1B2" * 9, "a token"),
        ("results.json", '{"key": "AKIA' + "Z9" * 8 + '"}', "a token"),
        ("run.yaml", "started with hf_" + "a" * 34, "a token"),
        ("tokenizer_config.json", '{"name_or_path": "/home/anna/models/demo"}', "a path of somebody's home"),
        ("metrics.jsonl", r'{"path": "C:\\Users\\anna\\x"}', "a path of somebody's home"),
        ("README.md", "see /Users/anna/notes", "a path of somebody's home"),
        ("loss.png", f"\x89PNG {Path.home()}/plot.py", "a path of "),
        ("samples.md", f"{Path.home()}/diary.txt", "a path of this machine"),
        ("loss.svg", "{folder}/loss.svg", "a path of this machine"),
    ],
)
def test_a_token_or_a_path_in_a_file_that_would_go_is_refused_and_not_repeated(run, name, text, what):
    text = text.replace("{folder}", str(run.resolve()))
    (run / name).write_text("# first line\n" + text if name != "run.yaml" else (run / name).read_text() + "# " + text)

    with pytest.raises(ValueError, match=re.escape(f"{run / name}, line ") + rf"\d+: holds {what}") as refusal:
        plan_push(run)

    secret = re.search(r"hf_\w+|ghp_\w+|AKIA\w+|/diary\.txt|anna/notes", text)
    assert secret is None or secret[0] not in str(refusal.value)


def test_the_token_of_this_machine_is_found_whatever_it_looks_like(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "correct horse")
    (run / "README.md").write_text("correct horse battery staple")

    with pytest.raises(ValueError, match="holds the token of the Hub"):
        plan_push(run)


def test_the_header_of_the_weights_is_looked_through(run):
    path = run / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "by": TOKEN})

    with pytest.raises(ValueError, match=r"model\.safetensors, line 1: holds a token"):
        plan_push(run)


@pytest.mark.parametrize(
    "text", ["hf_too_short", "/homework/anna", "a hf_ b", "/rootless", "the /root of all", "/usr/lib/python3"]
)
def test_what_only_looks_a_little_like_it_is_no_reason(run, text, monkeypatch):
    monkeypatch.setenv("HOME", "/root/of")
    (run / "README.md").write_text(text)

    plan_push(run)


def test_a_path_is_a_token_like_any_other_in_a_tokenizer(run):
    tokenizer = json.loads((run / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["/home/anna/"] = 299
    (run / "tokenizer.json").write_text(json.dumps(tokenizer))

    plan_push(run)


def test_run_yaml_goes_without_folders_of_this_machine_and_stays_as_it_is(run):
    text = (run / "run.yaml").read_text()
    text = text.replace("output_dir: out/demo", f"output_dir: {run}").replace("source: pydoc", "source: null")
    text = text.replace("files: null", "files: [/home/anna/a.txt, ../b.txt, c/d.txt, ~/e.txt]", 1)
    text = text.replace("name: null", "name: 'C:\\Users\\anna\\bpe'", 1)
    (run / "run.yaml").write_text(text)

    plan = plan_push(run)

    (note,) = plan.notes
    assert note == ("run.yaml goes without folders of this machine: `output_dir`, `tokenizer.name`, `data.files`")
    (run.parent / "sent.yaml").write_bytes(plan.files["run.yaml"])
    sent = load_config(run.parent / "sent.yaml")
    assert sent.output_dir == "demo"
    assert sent.tokenizer.name == "bpe"
    assert sent.data.files == ["a.txt", "b.txt", "c/d.txt", "e.txt"]
    assert (run / "run.yaml").read_text() == text


def test_a_run_that_is_not_finished_is_refused(run):
    (run / "results.json").unlink()

    with pytest.raises(ValueError, match=r"not finished: it has no results\.json\. Go on with `hfgpt train --resume`"):
        plan_push(run)


def damage(run, name, change):
    (run / name).write_bytes(change((run / name).read_bytes()))


def replace(run, old, new):
    damage(run, "config.json", lambda text: text.replace(old, new))


def set_weight(run, value):
    tensors = load_file(run / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, run / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "config.json").unlink(), "is no model folder: it has no config.json"),
        (lambda run: damage(run, "config.json", lambda text: text[:-20]), "config.json is damaged"),
        (lambda run: damage(run, "config.json", lambda text: b"[1]"), "config.json is damaged"),
        (lambda run: damage(run, "config.json", lambda text: b"[" * 10_000), "config.json is damaged"),
        (lambda run: (run / "model.safetensors").unlink(), "has no weights in .safetensors"),
        (lambda run: (run / "model.safetensors").rename(run / "pytorch_model.bin"), "pickles: pytorch_model.bin"),
        (lambda run: damage(run, "model.safetensors", lambda data: data[:-4]), "model.safetensors"),
        (lambda run: set_weight(run, float("nan")), "model.norm.weight holds NaN or infinity"),
        (lambda run: set_weight(run, float("-inf")), "model.norm.weight holds NaN or infinity"),
        (
            lambda run: damage(run, "config.json", lambda text: text.replace(b'layers": 1', b'layers": 2')),
            "not in the file",
        ),
        (
            lambda run: damage(run, "config.json", lambda text: text.replace(b'size": 16', b'size": 8')),
            "expected shape",
        ),
        (
            lambda run: damage(run, "run.yaml", lambda text: text + b"\nnonsense: 1\n"),
            "unknown key `nonsense`",
        ),
        (lambda run: shutil.rmtree(run), "is no folder"),
    ],
)
def test_what_is_no_whole_model_is_refused(run, spoil, message):
    spoil(run)

    with pytest.raises(ValueError, match=re.escape(message)):
        plan_push(run)


def test_a_link_out_of_the_folder_is_refused(run, tmp_path):
    (tmp_path / "private.md").write_text("mine")
    (run / "samples.md").unlink()
    (run / "samples.md").symlink_to(tmp_path / "private.md")

    with pytest.raises(ValueError, match=r"samples\.md is a link to .*private\.md, outside of the folder"):
        plan_push(run)


def test_shards_all_go(tmp_path):
    save_model(tmp_path, max_shard_size="20kB")

    goes = plan_push(tmp_path).files

    assert {path.name for path in tmp_path.glob("model*")} <= goes.keys()
    assert len([name for name in goes if "-of-" in name]) >= 2


def test_a_checkpoint_goes_as_a_model(tmp_path):
    def write(folder):
        save_model(folder)
        (folder / "trainer_state.json").write_text("{}")

    folder = save_checkpoint(tmp_path, Manifest(TrainState(4), {}), write, {}, keep_last=2)

    assert plan_push(folder).skipped == {
        "manifest.json": "not on the list",
        "random_states_0.pt": "pickle",
        "trainer_state.json": "not on the list",
    }
