"""Runs with tokenizers as strangers bring them end with right figures, or do not begin."""

import json
import math

import odd_tokenizers as odd
import pytest
import torch
import yaml
from runs import assert_same_run, metrics, run, run_until_killed
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

SHORT = ["train.epochs=null", "train.max_steps=2", "optim.warmup_steps=1", "train.save_every=1"]
GIVEN = [*SHORT, "tokenizer.vocab_size=4096"]
"""Of runs whose tokenizer is given: the recipe's size of one would have no effect."""

ODD = {
    "from 1": (odd.renumbered(lambda number: number + 1), 291),
    "gaps": (odd.renumbered(lambda number: 2 * number), 579),
    "pad on the last row": (odd.pad_on_the_last_row(), 320),
    "pad added": (odd.with_pad(), 291),
    "word added": (odd.with_added("<user>", is_special=False), 291),
}


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def checks_of(folder):
    return next(line["checks"] for line in metrics(folder) if "checks" in line)


def save_gpt2(folder, tokenizer, rows, **config):
    torch.manual_seed(0)
    shape = {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": None, "eos_token_id": None}
    GPT2LMHeadModel(GPT2Config(vocab_size=rows, **shape | config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def finetune(recipe):
    """A recipe that goes on from a model `base`."""
    config = yaml.safe_load(recipe.read_text())
    del config["model"], config["tokenizer"]
    recipe.write_text(yaml.safe_dump({**config, "init_from": str(recipe.parent / "base")}))
    return recipe


@pytest.mark.parametrize("name", ODD)
def test_a_fresh_run_has_a_row_for_every_id_and_ends_with_its_figures(recipe, tmp_path, name):
    tokenizer, rows = ODD[name]
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    folder = run(recipe, "run", *GIVEN, f"tokenizer.name={tmp_path / 'tokenizer'}")

    model, saved = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == rows
    assert saved.get_vocab() == tokenizer.get_vocab()
    assert saved.pad_token_id is not None
    results = results_of(folder)
    bits = results["val_loss"] * results["validation_tokens"] / math.log(2) / 980  # the last fifth of the text
    assert results["bits_per_byte"] == pytest.approx(bits, rel=0.02)  # but for what fills no row
    assert results["unknown_share"] == 0


@pytest.mark.parametrize("name", ["pad added", "pad on the last row"])
def test_a_model_that_has_no_row_for_its_pad_token_is_trained_further(finetune, tmp_path, name):
    save_gpt2(tmp_path / "base", ODD[name][0], 290)

    folder = run(finetune, "run", *SHORT)

    saved = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.vocab_size, saved.pad_token) == (290, odd.END)
    assert model(**saved(["The", "The fox."], padding=True, return_tensors="pt")).logits.isfinite().all()
    assert results_of(folder)["bits_per_byte"] is not None


def test_a_model_that_has_no_row_for_a_word_is_not_trained(finetune, tmp_path):
    save_gpt2(tmp_path / "base", ODD["word added"][0], 290)

    with pytest.raises(ValueError, match=r"makes the id 290, the model's `vocab_size` is 290\. '<user>' was added"):
        run(finetune, "run", *SHORT)
    assert not (tmp_path / "run").exists()


def test_mostly_unknown_words_are_a_warning_and_no_bits_per_byte(recipe, tmp_path, capsys):
    odd.words(["the", "of", "and", "to"]).save_pretrained(tmp_path / "tokenizer")

    folder = run(recipe, "run", *GIVEN, f"tokenizer.name={tmp_path / 'tokenizer'}", "data.block_size=16")

    results, check = results_of(folder), checks_of(folder)["unknown"]
    assert 0.7 < results["unknown_share"] <= check["value"] < 1
    assert results["bits_per_byte"] is None
    share = f"{check['value']:.1%} of the tokens are unknown to the tokenizer"
    assert f"warning: {share}: a loss says little of such a text." in " ".join(capsys.readouterr().err.split())
    card = (folder / "README.md").read_text()
    assert f"**Of the validation tokens {100 * results['unknown_share']:.1f}% are unknown to it**" in card
    assert "or its tokens do not determine the text" in card


def test_a_text_that_a_tokenizer_knows_has_a_share_of_nothing(recipe, capsys):
    folder = run(recipe, "run", "train.epochs=null", "train.max_steps=2", "optim.warmup_steps=1")

    assert checks_of(folder)["unknown"]["value"] == results_of(folder)["unknown_share"] == 0
    assert "0.0% of the tokens are unknown to the tokenizer" in " ".join(capsys.readouterr().err.split())
    assert "unknown to it" not in (folder / "README.md").read_text()


def test_lowered_letters_have_no_bits_per_byte(recipe, tmp_path):
    odd.lowering().save_pretrained(tmp_path / "tokenizer")

    folder = run(recipe, "run", *GIVEN, f"tokenizer.name={tmp_path / 'tokenizer'}")

    assert (results_of(folder)["unknown_share"], results_of(folder)["bits_per_byte"]) == (0, None)


def test_characters_without_an_end_of_text_are_trained_as_nanogpt_does_and_resumed(recipe, tmp_path):
    text = (tmp_path / "text.txt").read_text()
    odd.characters(text).save_pretrained(tmp_path / "tokenizer")
    options = [*GIVEN, f"tokenizer.name={tmp_path / 'tokenizer'}", "train.max_steps=4"]
    with pytest.raises(ValueError, match=r"no eos token, which goes between documents\. Set `data\.separator=null`"):
        run(recipe, "run", *options)

    whole = run(recipe, "whole", *options, "data.separator=null")
    run_until_killed(recipe, "resumed", 2, *options, "data.separator=null")
    resumed = run(recipe, "resumed", *options, "data.separator=null", resume=True)

    assert_same_run(whole, resumed)
    assert results_of(whole)["validation_tokens"] == round(len(text) * 0.2)
    assert AutoModelForCausalLM.from_pretrained(whole).config.eos_token_id is None


def test_an_empty_prompt_needs_something_to_begin_with(recipe, tmp_path):
    odd.characters((tmp_path / "text.txt").read_text()).save_pretrained(tmp_path / "tokenizer")
    options = [*GIVEN, f"tokenizer.name={tmp_path / 'tokenizer'}", "data.separator=null"]

    with pytest.raises(ValueError, match=r"`sample\.prompt` \(''\): .*no eos token, from which an empty text"):
        run(recipe, "run", *options, "sample.prompt=")
    with pytest.raises(ValueError, match=r"`sample\.prompt` \('한국'\): the tokenizer does not know '한' \(U\+D55C\)"):
        run(recipe, "run", *options, "sample.prompt=한국")


def test_the_end_of_text_of_a_config_goes_between_documents(finetune, tmp_path):
    save_gpt2(tmp_path / "base", odd.pieces(), 60, eos_token_id=1)  # as KoGPT2's config does

    folder = run(finetune, "run", *SHORT)

    saved = AutoTokenizer.from_pretrained(folder)
    assert (saved.eos_token_id, saved.pad_token_id) == (1, 1)
