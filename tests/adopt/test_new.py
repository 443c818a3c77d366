"""`hfgpt new`: the project that it writes, and the changes that the guide shows, as they stand there."""

import importlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import hfgpt
from hfgpt import HFGPTConfig, HFGPTForCausalLM
from hfgpt.adopt.new import new_project, requirement
from hfgpt.check import check
from hfgpt.check.report import to_markdown
from hfgpt.cli import main
from hfgpt.evaluation.load_model import load_causal_lm
from hfgpt.generation.generator import continue_text, load_generator
from hfgpt.generation.params import SamplingParams
from hfgpt.hub.allowlist import plan_push
from hfgpt.weights.remote_code import PACKAGE

ROOT = Path(__file__).parents[2]
SHAPE = {"vocab_size": 97, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 8}
TINY_RUN = {
    "model.n_embd": 16,
    "model.n_layer": 1,
    "model.n_positions": 32,
    "tokenizer.vocab_size": 300,
    "data.source": None,
    "data.files": "my.txt",
    "data.block_size": 16,
    "optim.warmup_steps": 1,
    "train.max_steps": 4,
    "train.batch_size": 2,
    "train.eval_every": 2,
    "train.save_every": 2,
    "train.eval_rows": 2,
    "train.final_eval_rows": 2,
    "sample.max_new_tokens": 3,
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project, which this process can import."""
    folder = new_project("own_gpt", tmp_path_factory.mktemp("new"))
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def inside(project, monkeypatch, lines):
    """The same, with a text, as the current folder."""
    monkeypatch.chdir(project)
    Path("my.txt").write_text("\n".join(lines))
    return project


@pytest.mark.parametrize(
    "name", ["", "My_GPT", "my-gpt", "../my_gpt", "2gpt", "class", "json", "torch", "hfgpt", "gpt2", "tests"]
)
def test_a_name_that_is_taken_or_is_none_is_refused_and_nothing_is_written(name, tmp_path):
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        new_project(name, tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path):
    (tmp_path / "my_gpt").mkdir()

    with pytest.raises(FileExistsError, match="my_gpt exists"):
        new_project("my_gpt", tmp_path)

    assert list(tmp_path.rglob("*")) == [tmp_path / "my_gpt"]


def test_a_project_that_cannot_be_finished_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("hfgpt.adopt.new.project_files", lambda name: {"README.md": "", "a": "", "a/b": ""})

    with pytest.raises(OSError, match="a"):
        new_project("my_gpt", tmp_path)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("noted", "asked"),
    [
        (None, f"hfgpt>={hfgpt.__version__}"),
        ('{"url": "file:///my%20code/hfgpt", "dir_info": {"editable": true}}', "hfgpt @ file:///my%20code/hfgpt"),
        (
            '{"url": "https://example.com/hfgpt.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}, '
            '"subdirectory": "python"}',
            "hfgpt @ git+https://example.com/hfgpt.git@abc#subdirectory=python",
        ),
        ('{"url": "https://example.com/hfgpt.whl", "archive_info": {}}', "hfgpt @ https://example.com/hfgpt.whl"),
    ],
)
def test_a_project_asks_for_hfgpt_where_this_one_came_from(noted, asked):
    assert requirement(noted) == asked


def test_its_own_code_names_hfgpt_only_as_where_it_began(project):
    for path in (project / "own_gpt").glob("*.py"):
        first, *rest = path.read_text().splitlines()
        if path.name not in ("__init__.py", "weights.py"):
            assert first.startswith("# Began as ")
            assert [line for line in rest if "hfgpt" in line.lower()] == [], path


def test_its_model_is_hfgpts_to_the_bit(project):
    own = importlib.import_module("own_gpt")
    ids = torch.arange(24).view(2, 12)
    models = []
    for config_class, model_class in [
        (HFGPTConfig, HFGPTForCausalLM),
        (own.OwnGPTConfig, own.OwnGPTForCausalLM),
    ]:
        torch.manual_seed(0)
        models.append(model_class(config_class(**SHAPE)).eval())

    ours, theirs = (model(ids, labels=ids) for model in models)

    assert models[1].config.model_type == "own_gpt"
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)


def test_its_table_reads_a_gpt2_and_refuses_by_name_what_fits_nowhere(project, tmp_path, monkeypatch):
    weights = importlib.import_module("own_gpt.weights")
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(**SHAPE, bos_token_id=0, eos_token_id=0)).eval()
    gpt2.save_pretrained(tmp_path / "gpt2")
    ids = torch.arange(24).view(2, 12)

    model = weights.from_gpt2(tmp_path / "gpt2").eval()

    torch.testing.assert_close(model(ids).logits, gpt2(ids).logits)
    monkeypatch.setattr(weights, "WHOLE_MODEL", [each for each in weights.WHOLE_MODEL if each.foreign != "wpe.weight"])
    with pytest.raises(ValueError, match=r"wpe\.weight: GPT-2 has it and OwnGPT has not"):
        weights.from_gpt2(tmp_path / "gpt2")
    monkeypatch.setattr(weights, "LEFT_OUT", ("wpe.weight",))
    with pytest.raises(ValueError, match=r"embed_positions\.weight: GPT-2 has no such tensor"):
        weights.from_gpt2(tmp_path / "gpt2")


def test_its_recipe_trains_it_in_both_loops_to_the_same_bits_and_it_can_be_pushed(inside):
    weights = []
    for loop in ("accelerate", "trainer"):
        results = hfgpt.train("recipe.yaml", TINY_RUN | {"loop": loop, "output_dir": f"out/{loop}"})
        weights.append(load_file(f"out/{loop}/model.safetensors"))

        assert results["run"]["model_class"] == "OwnGPTForCausalLM"
        plan = plan_push(f"out/{loop}")
        assert {"modeling_own_gpt.py", "configuration_own_gpt.py", "gpt.py", "README.md"} <= {*plan.files}
        assert "`OwnGPTForCausalLM`" in Path(f"out/{loop}/README.md").read_text()

    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_of_it_goes_on_from_its_checkpoint_and_starts_from_a_folder(inside):
    stopped = TINY_RUN | {"output_dir": "out/stopped"}
    with pytest.raises(KeyboardInterrupt):
        hfgpt.train("recipe.yaml", stopped, on_step=stop_at_3)

    hfgpt.train("recipe.yaml", stopped, resume=True)
    hfgpt.train("recipe.yaml", TINY_RUN | {"output_dir": "out/whole"})

    first, second = (load_file(f"out/{name}/model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    further = yaml.safe_load(Path("recipe.yaml").read_text())
    del further["model"], further["tokenizer"]
    Path("further.yaml").write_text(yaml.safe_dump(further))
    start = {name: value for name, value in TINY_RUN.items() if not name.startswith(("model.", "tokenizer."))}
    results = hfgpt.train("further.yaml", start | {"init_from": "out/whole", "output_dir": "out/further"})
    assert results["run"]["starts_from"] == "folder"


@pytest.fixture
def saved(inside, tokenizer):
    """A folder of its model, with its code and a tokenizer."""
    own = importlib.import_module("own_gpt")
    torch.manual_seed(0)
    model = own.OwnGPTForCausalLM(own.OwnGPTConfig(**SHAPE | {"vocab_size": len(tokenizer), "n_positions": 128})).eval()
    model.save_pretrained("saved")
    tokenizer.save_pretrained("saved")
    return model


@pytest.mark.parametrize("is_imported", [True, False])
def test_hfgpt_writes_and_scores_with_its_folder_as_transformers_does(saved, tokenizer, monkeypatch, is_imported):
    if not is_imported:
        monkeypatch.delitem(transformers.CONFIG_MAPPING._extra_content, "own_gpt")
    greedy = SamplingParams(max_new_tokens=5, temperature=0)
    inputs = tokenizer("two words", return_tensors="pt")
    expected = saved.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.eos_token_id)

    written = "".join(continue_text(load_generator("saved", trust_remote_code=not is_imported), "two words", greedy))
    scored, _ = load_causal_lm("saved", trust_remote_code=not is_imported)

    assert written == tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert torch.equal(scored(**inputs).logits, saved(**inputs).logits)
    assert type(scored).__module__.startswith("own_gpt." if is_imported else "transformers_modules.")


@pytest.mark.parametrize(
    "command", ["generate saved A", "explore saved A", "play saved", "evaluate saved --data my.txt"]
)
def test_its_code_is_run_only_if_it_is_trusted(saved, command, monkeypatch, capsys):
    monkeypatch.delitem(transformers.CONFIG_MAPPING._extra_content, "own_gpt")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # `main` sets it for good
    codes = []
    for words in (command, f"{command} --trust-remote-code"):
        monkeypatch.setattr("sys.argv", ["hfgpt", *words.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        codes.append(ended.value.code)

    assert codes == [2, 0]
    assert capsys.readouterr().err.startswith("error: saved brings code of its own, which would be run. Add --trust-")


def stop_at_3(step):
    if step == 3:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.n_embdd": 8}, r"`model\.n_embdd`: OwnGPTConfig has no such field\. Did you mean `n_embd`"),
        ({"model.n_head": 3}, r"`model`: .*not divisible"),
        ({"data.block_size": 999}, r"`data\.block_size` \(999\) is longer"),
        ({"model_class": "own_gpt"}, "`model_class` must be `package.module:Class`, got 'own_gpt'"),
        ({"model_class": "no_gpt.model:GPT"}, "there is no module 'no_gpt'. Run this in the folder that holds it"),
        ({"model_class": "own_gpt.gpt:GPT"}, "own_gpt.gpt has no class 'GPT' that is a transformers model"),
        ({"model_class": "own_gpt.modeling_own_gpt:OwnGPTModel"}, "no class 'OwnGPTModel' that is .* `generate`"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_before_anything_is_written(inside, overrides, message):
    with pytest.raises(ValueError, match=message):
        hfgpt.train("recipe.yaml", TINY_RUN | overrides | {"output_dir": "out/refused"})

    assert not Path("out/refused").exists()


def diffs_of(text):
    return re.findall(r"^```diff\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


CHANGES = {
    "parallel": diffs_of((PACKAGE / "adopt/templates/README.md.jinja").read_text().replace("{{ name }}", "my_gpt"))[0],
    **dict(zip(("activation", "rmsnorm"), diffs_of((ROOT / "docs/wrap-your-own-gpt.md").read_text()), strict=True)),
    **dict(zip(("rope", "gqa"), diffs_of((ROOT / "docs/change-attention.md").read_text()), strict=True)),
}
"""The changes that the project's README and the guide show."""


def changed_project(name, folder, owner="my"):
    """A project with one change made, its package called after both."""
    package, prefix = f"{owner}_{name}", f"{owner.capitalize()}{name.capitalize()}"
    project = new_project(package, folder)
    diff = CHANGES[name].replace("my_gpt", package).replace("MyGPT", prefix)
    # Whatever repository may lie around the folder is none of git's business.
    outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(
        ["git", "apply", "-"], input=diff, cwd=project, env=outside, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return project, package, prefix


@pytest.mark.parametrize("name", [*CHANGES])
def test_a_change_of_the_guide_applies_and_gpt2_finds_its_place(name, tmp_path, monkeypatch):
    project, package, prefix = changed_project(name, tmp_path)
    monkeypatch.syspath_prepend(project)
    own = importlib.import_module(package)
    GPT2LMHeadModel(GPT2Config(**SHAPE, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "gpt2")
    torch.manual_seed(0)
    before = HFGPTForCausalLM(HFGPTConfig(**SHAPE)).eval()
    config = getattr(own, f"{prefix}Config")(**SHAPE)
    model = getattr(own, f"{prefix}ForCausalLM")(config).eval()
    alone = importlib.import_module(f"{package}.gpt").GPT(config).eval()
    alone.load_state_dict({name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()})
    shared = {key: each for key, each in before.state_dict().items() if is_like(each, model.state_dict().get(key))}
    ids = torch.arange(24).view(2, 12)

    importlib.import_module(f"{package}.weights").from_gpt2(tmp_path / "gpt2")

    torch.testing.assert_close(alone(ids), model(ids).logits)
    model.load_state_dict(shared, strict=False)
    assert not torch.allclose(model(ids).logits, before(ids).logits, atol=1e-4)  # it is a change


def is_like(tensor, other):
    return other is not None and other.shape == tensor.shape


OF_A_BLOCK = (
    "saved-and-loaded-is-the-same-to-the-bit",
    "changing-a-token-leaves-earlier-logits",
    "left-padding-changes-nothing",
    "packed-documents-do-not-leak",
    "cached-logits-equal-uncached",
    "a-static-cache-gives-the-same-logits",
    "batched-generation-equals-one-by-one",
    "sdpa-gives-the-same-logits-as-eager",
)
"""Promises that a changed block most easily breaks; `make test`, below, tries all of them once."""


@pytest.mark.parametrize("name", [*CHANGES])
def test_a_change_of_the_guide_keeps_what_is_promised_of_a_block(name, tmp_path, monkeypatch):
    project, package, prefix = changed_project(name, tmp_path, "their")
    monkeypatch.chdir(tmp_path)  # where nothing of it is, but on the path
    monkeypatch.syspath_prepend(project)

    report = check(f"{package}.modeling_{package}:{prefix}ForCausalLM", only=OF_A_BLOCK)

    assert len(report.results) == len(OF_A_BLOCK)
    assert report.is_passed, to_markdown(report)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_test_is_green_at_once(tmp_path):
    project = new_project("my_gpt", tmp_path)

    done = subprocess.run(
        ["make", "test", f"PYTHON={sys.executable}"],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "3 passed" in done.stdout
