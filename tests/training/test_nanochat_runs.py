"""Runs of the second architecture: the promises of the first, and a folder that every command takes."""

import json
import shutil

import pytest
import transformers
import yaml
from runs import LOOPS, assert_same_path, assert_same_run, run, run_to_step, run_until_killed
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfgpt.cli import main
from hfgpt.config.loading import load_config
from hfgpt.modeling_nanochat import NanoChatForCausalLM
from hfgpt.results.card import compare_card
from hfgpt.results.records import read_results
from hfgpt.training.checkpoint import newest_checkpoint
from hfgpt.weights import load

MODEL = {"architecture": "nanochat", "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
MODEL |= {"num_key_value_heads": 2, "attention_dropout": 0.1}


@pytest.fixture
def modern(recipe):
    """The recipe of the other tests with the other network."""
    content = yaml.safe_load(recipe.read_text()) | {"model": MODEL}
    content["train"] |= {"epochs": 2}
    recipe.write_text(yaml.safe_dump(content))
    return recipe


def test_both_loops_walk_the_same_path_and_resume_on_it_to_the_last_bit(modern):
    whole = run(modern, "whole")

    for loop in LOOPS:
        run_until_killed(modern, f"stopped-{loop}", 7, f"loop={loop}", "train.gradient_accumulation_steps=1")
        assert_same_run(whole, run(modern, f"stopped-{loop}", f"loop={loop}", resume=True))


def test_the_folder_of_a_run_is_taken_by_transformers_and_by_every_command(modern, monkeypatch, capsys):
    folder = run(modern, "out")
    text = str(modern.parent / "text.txt")

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model) is transformers.NanoChatForCausalLM
    assert type(load(folder / "checkpoint-4")) is NanoChatForCausalLM
    ids = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert not [*folder.rglob("*.py")]

    def call(*words):
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["hfgpt", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        return stop.value.code or 0, said.out, said.err

    def done(*words):
        code, out, err = call(*words)
        assert code == 0, err
        return out

    text_of_transformers = tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    assert text_of_transformers in done("generate", folder, "The", "--max-new-tokens", 5, "--temperature", 0)
    assert "perplexity" in done("evaluate", folder, "--data", text)
    assert "Most likely continuation" in done("explore", folder, "The")
    assert "model.safetensors" in done("push", folder, "someone/model", "--dry-run")
    twin = shutil.copytree(folder, folder.with_name("twin"))
    assert "perplexity" in done("compare", folder, twin, "--picture", modern.parent / "curves.png")
    assert compare_card(folder) is None
    card = (folder / "README.md").read_text()
    assert "- nanochat" in card
    assert "A language model of the nanochat architecture" in card
    assert "trust_remote_code" not in card
    assert "--to gguf" not in card
    assert read_results(folder / "results.json")["run"]["model"]["architecture"] == "nanochat"
    assert "verified" in done("convert", folder, modern.parent / "copy", "--to", "nanochat", "--verify")
    code, _, err = call("convert", folder, modern.parent / "model.gguf", "--to", "gguf")
    assert code == 2
    assert "network of nanochat, which the format 'gguf' cannot hold" in err
    assert not (modern.parent / "model.gguf").exists()


def test_a_run_may_go_on_from_a_nanochat_of_transformers_with_another_dropout(modern, tokenizer):
    config = transformers.NanoChatConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    base = modern.parent / "base"
    transformers.NanoChatForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    content = yaml.safe_load(modern.read_text()) | {"init_from": str(base), "model": {"attention_dropout": 0.3}}
    del content["tokenizer"]
    modern.write_text(yaml.safe_dump(content))

    folder = run_to_step(modern, "tuned", 3)

    tuned = load(newest_checkpoint(folder, warn=print))
    assert tuned.config.attention_dropout == 0.3
    assert tuned.config.intermediate_size == 64


@pytest.mark.slow
def test_processes_that_share_the_model_train_the_same(modern, launch):
    whole = run(modern, "whole", "train.batch_size=4", "model.attention_dropout=0")
    process = launch("shared", "train.batch_size=2", "train.shard=true", "model.attention_dropout=0")

    assert process.wait(timeout=300) == 0, (modern.parent / "shared.log").read_text()[-3000:]
    assert_same_path(whole, modern.parent / "shared")
    config = json.loads((modern.parent / "shared" / "config.json").read_text())
    assert config["architectures"] == ["NanoChatForCausalLM"]


@pytest.mark.slow
def test_a_compiled_run_trains_the_same(modern):
    overrides = ["train.epochs=null", "train.max_steps=5", "model.attention_dropout=0"]

    assert_same_path(run(modern, "eager", *overrides), run(modern, "compiled", *overrides, "train.compile=true"))


def test_the_config_of_a_recipe_is_that_of_transformers(modern):
    config = load_config(modern, ["model.rope_theta=500", "model.final_logit_softcapping=20"])

    assert config.model["architecture"] == "nanochat"
    assert config.model["final_logit_softcapping"] == 20.0
    assert load_config(modern, ["model.architecture=nanochat"]).model == load_config(modern).model


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.architecture=nanochta", "must be one of .'gpt2', 'nanochat'., got 'nanochta'. Did you mean `nanochat`"),
        ("model.architecture=gpt2", "`n_head` .4. and `num_key_value_heads` .2. are the same field"),
        ("model.resid_pdrop=0.1", "`model.resid_pdrop` is of the architecture gpt2, .* which has attention_dropout"),
        ("model.activation_function=gelu", "`model.activation_function` is of the architecture gpt2"),
        ("model.vocab_size=300", "`model.vocab_size` .300. comes from the tokenizer"),
        ("model.n_head=3", "no multiple of twice `num_attention_heads` .`n_head`, 3."),
        ("model.num_key_value_heads=3", "no multiple of `num_key_value_heads` .3."),
        ("model.rope_theta=0", "`rope_theta` must be finite and above 0, got 0"),
        ("model.rope_theta=much", "`model.rope_theta` must be a number, got 'much'"),
        ("data.block_size=128", "`data.block_size` .128. is longer than the model's `n_positions` .64."),
        ("model.softcap=15", "Did you mean `model.final_logit_softcapping=15`"),
        ("arch=nanochat", "Did you mean `model.architecture=nanochat`"),
    ],
)
def test_a_recipe_that_no_nanochat_can_be_is_refused(modern, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(modern, [override])
