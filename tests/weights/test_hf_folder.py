"""Folders of transformers through hfgpt's own reader. The oracle is `from_pretrained`, transformers' way in."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2ForTokenClassification, GPT2LMHeadModel

from hfgpt import HFGPTForCausalLM
from hfgpt.weights import load
from hfgpt.weights.convert import convert


@pytest.fixture
def gpt2(make_gpt2):
    return make_gpt2()


def rewrite(folder, kind):
    """Write a GPT-2 folder's weights the way other versions of transformers did."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    if kind == "without prefix":
        tensors = {name.removeprefix("transformer."): each for name, each in tensors.items()}
        tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(2)}
        save_file(tensors, file, metadata={"format": "pt"})
    elif kind in ("old .bin", "older .bin"):
        tensors |= {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
        is_archive = kind == "old .bin"
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_archive)
    else:
        names = sorted(tensors)
        shards = {"a": names[:10], "b": names[10:]}
        is_safe = kind == "shards"
        stem, suffix = ("model", "safetensors") if is_safe else ("pytorch_model", "bin")
        weight_map = {}
        for number, (_, some) in enumerate(shards.items(), start=1):
            shard = f"{stem}-0000{number}-of-00002.{suffix}"
            part = {name: tensors[name] for name in some}
            if is_safe:
                save_file(part, folder / shard, metadata={"format": "pt"})
            else:
                torch.save(part, folder / shard)
            weight_map |= dict.fromkeys(some, shard)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["without prefix", "old .bin", "older .bin", "shards", "shards of .bin"])
def test_a_folder_of_any_age_gives_what_from_pretrained_gives(gpt2, tmp_path, kind):
    gpt2.save_pretrained(tmp_path / "gpt2")
    rewrite(tmp_path / "gpt2", kind)

    result = convert(tmp_path / "gpt2", tmp_path / "out", "hfgpt", verify=True)

    expected = HFGPTForCausalLM.from_pretrained(tmp_path / "gpt2").state_dict()
    found = HFGPTForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())
    assert result.comparison.passed
    masks = [step.name for step in result.lossy if step.action == "dropped"]
    assert masks == {
        "without prefix": ["h.0.attn.bias", "h.1.attn.bias"],
        "old .bin": ["transformer.h.0.attn.masked_bias", "transformer.h.1.attn.masked_bias"],
        "older .bin": ["transformer.h.0.attn.masked_bias", "transformer.h.1.attn.masked_bias"],
    }.get(kind, [])


def test_a_missing_shard_is_refused_by_name(gpt2, tmp_path):
    gpt2.save_pretrained(tmp_path / "gpt2")
    rewrite(tmp_path / "gpt2", "shards")
    (tmp_path / "gpt2/model-00002-of-00002.safetensors").unlink()

    with pytest.raises(ValueError, match=r"no model .*model-00002-of-00002\.safetensors"):
        convert(tmp_path / "gpt2", tmp_path / "out", "hfgpt")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused_by_name(gpt2, tmp_path, share):
    gpt2.save_pretrained(tmp_path / "gpt2")
    file = tmp_path / "gpt2/model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])

    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        convert(tmp_path / "gpt2", tmp_path / "out", "hfgpt")


def test_the_head_of_a_classifier_is_dropped_and_said(gpt2, tmp_path):
    GPT2ForTokenClassification(gpt2.config).save_pretrained(tmp_path / "gpt2")

    result = convert(tmp_path / "gpt2", tmp_path / "out", "hfgpt")

    assert {step.name for step in result.lossy} == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ValueError, match=r"--strict: classifier\.bias would be dropped"):
        convert(tmp_path / "gpt2", tmp_path / "strict", "hfgpt", strict=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_ctx", 128),  # as in chapter 7.6 of the Hugging Face course
        ("n_ctx", 32),
        ("n_ctx", None),
        ("intermediate_size", 64),
        ("num_key_value_heads", 1),
    ],
)
def test_what_gpt2_does_not_read_of_its_config_has_no_effect_and_is_said(gpt2, tmp_path, caplog, name, value):
    gpt2.save_pretrained(tmp_path / "gpt2")
    config = json.loads((tmp_path / "gpt2/config.json").read_text())
    (tmp_path / "gpt2/config.json").write_text(json.dumps(config | {name: value}))
    ids = torch.arange(60).view(3, 20)
    expected = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").eval()(ids).logits

    model = HFGPTForCausalLM.from_pretrained(tmp_path / "gpt2").eval()
    result = convert(tmp_path / "gpt2", tmp_path / "out", "hfgpt", verify=True)

    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=2e-5)
    assert result.comparison.passed
    assert model.config.max_position_embeddings == 64
    assert f"`{name}` ({value}) is not `n_" in caplog.text
    assert "it has no effect in GPT-2, and is ignored." in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"n_ctx": 64},
        {"classifier_dropout": None},
        {"hidden_act": "relu", "layer_norm_eps": 0.1},
        {"rope_theta": 1e4, "sliding_window": 4, "head_dim": 7},
        {"n_special": 0, "predict_special_tokens": True, "pruned_heads": {}},
    ],
    ids=lambda change: min(change),
)
def test_other_tools_keys_of_a_gpt2_config_change_nothing(gpt2, tmp_path, change):
    gpt2.save_pretrained(tmp_path / "gpt2")
    config = json.loads((tmp_path / "gpt2/config.json").read_text())
    (tmp_path / "gpt2/config.json").write_text(json.dumps(config | change))

    assert convert(tmp_path / "gpt2", tmp_path / "out", "hfgpt", verify=True).comparison.passed


def test_a_head_that_the_config_would_throw_away_is_refused(make_gpt2, tmp_path):
    make_gpt2(tie_word_embeddings=False).save_pretrained(tmp_path / "gpt2")
    config = json.loads((tmp_path / "gpt2/config.json").read_text())
    (tmp_path / "gpt2/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))

    with pytest.raises(ValueError, match=r"lm_head\.weight differs from transformer\.wte\.weight, though config\.json"):
        convert(tmp_path / "gpt2", tmp_path / "out", "hfgpt")


def test_settings_of_generation_go_along(gpt2, tmp_path):
    gpt2.generation_config.temperature = 0.7
    gpt2.generation_config.do_sample = True
    gpt2.save_pretrained(tmp_path / "gpt2")

    convert(tmp_path / "gpt2", tmp_path / "hfgpt", "hfgpt")
    convert(tmp_path / "hfgpt", tmp_path / "again", "gpt2")

    for model in (
        HFGPTForCausalLM.from_pretrained(tmp_path / "hfgpt"),
        GPT2LMHeadModel.from_pretrained(tmp_path / "again"),
    ):
        assert model.generation_config.temperature == 0.7
        assert model.generation_config.do_sample


def test_a_tokenizer_can_be_named(gpt2, tokenizer, tmp_path):
    gpt2.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    convert(tmp_path / "gpt2", tmp_path / "out", "hfgpt", tokenizer=str(tmp_path / "tokenizer"))

    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("of the file")["input_ids"]
        == tokenizer("of the file")["input_ids"]
    )
    with pytest.raises(ValueError, match="no tokenizer 'nobody/nothing'"):
        convert(tmp_path / "gpt2", tmp_path / "other", "hfgpt", tokenizer="nobody/nothing")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("to", ["nanogpt", "llms-from-scratch", "llm.c", "openai"])
def test_an_epsilon_that_a_format_does_not_know_is_refused(make_gpt2, tmp_path, to):
    activation = "gelu" if to == "nanogpt" else "gelu_new"
    make_gpt2(layer_norm_epsilon=1e-6, activation_function=activation).save_pretrained(tmp_path / "gpt2")

    with pytest.raises(ValueError, match="needs `layer_norm_epsilon` = 1e-05, the model has 1e-06"):
        convert(tmp_path / "gpt2", tmp_path / "out", to)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight_map": {"wte.weight": "../../secret.safetensors"}}, "names '../../secret.safetensors', which is no"),
        ({"weight_map": {"wte.weight": "/etc/passwd"}}, "names '/etc/passwd', which is no file beside it"),
        ({"weight_map": ["model.safetensors"]}, "no index of shards"),
        ({}, "no index of shards"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(gpt2, tmp_path, content, message):
    gpt2.save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2/model.safetensors").unlink()
    (tmp_path / "gpt2/model.safetensors.index.json").write_text(json.dumps(content))

    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "gpt2", tmp_path / "out", "hfgpt")


@pytest.mark.parametrize("form", ["gpt2", "hfgpt"])
def test_code_that_comes_with_a_folder_is_not_run(gpt2, tokenizer, tmp_path, form):
    gpt2.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    convert(tmp_path / "gpt2", tmp_path / "source", form)
    for name, classes in (
        ("config.json", {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}),
    ):
        settings = json.loads((tmp_path / "source" / name).read_text())
        (tmp_path / "source" / name).write_text(json.dumps(settings | {"auto_map": classes}))
    (tmp_path / "source/evil.py").write_text(f"open({str(tmp_path / 'sang')!r}, 'w')")

    load(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", "hfgpt", verify=True)

    assert not (tmp_path / "sang").exists()
    assert not list((tmp_path / "out").glob("evil*"))
    assert not any("evil" in file.read_text() for file in (tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 3}, r"transformer\.h\.2\.ln_1\.weight: not in the file"),
        ({"n_layer": 1}, r"transformer\.h\.1\.attn\.c_attn\.bias: left over"),
        ({"vocab_size": 319}, r"transformer\.wte\.weight: expected shape \(319, 32\), got \(320, 32\)"),
        ({"n_embd": 64}, r"transformer\.wte\.weight: expected shape \(320, 64\), got \(320, 32\)"),
        ({"n_embd": "wide"}, "n_embd|hidden_size"),
        ({"scale_attn_weights": False}, "`scale_attn_weights` must be True"),
        ({"model_type": "llama"}, "`model_type` is 'llama'"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused_by_name(gpt2, tmp_path, change, message):
    gpt2.save_pretrained(tmp_path / "gpt2")
    file = tmp_path / "gpt2/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))

    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "gpt2", tmp_path / "out", "hfgpt")
    assert not (tmp_path / "out").exists()


def test_a_repository_of_the_hub_is_read_with_its_tokenizer(gpt2, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository, commit = tmp_path / "cache/models--someone--tiny", "0" * 40  # as the Hub's client keeps it
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    gpt2.save_pretrained(repository / "snapshots" / commit, max_shard_size="40KB")
    tokenizer.save_pretrained(repository / "snapshots" / commit)

    result = convert("someone/tiny", tmp_path / "out", "hfgpt", verify=True)
    convert(tmp_path / "out", tmp_path / "again", "gpt2", tokenizer="someone/tiny")

    assert result.comparison.passed
    for place in ("out", "again"):
        assert AutoTokenizer.from_pretrained(tmp_path / place)("of it")["input_ids"] == tokenizer("of it")["input_ids"]
    with pytest.raises(ValueError, match="no model 'someone/tinier'"):
        convert("someone/tinier", tmp_path / "other", "hfgpt")


def test_a_tokenizer_that_cannot_go_along_is_refused(make_gpt2, tokenizer, tmp_path):
    make_gpt2(vocab_size=319).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")

    with pytest.raises(ValueError, match=r"makes the id 319, the model's `vocab_size` is 319"):
        convert(tmp_path / "gpt2", tmp_path / "out", "hfgpt")
    with pytest.raises(ValueError, match=r"`--tokenizer` has no effect: llm\.c has no place for one"):
        convert(tmp_path / "gpt2", tmp_path / "out", "llm.c", tokenizer=str(tmp_path / "gpt2"))
    [note] = convert(tmp_path / "gpt2", tmp_path / "out", "llm.c").notes
    assert note.startswith("the tokenizer stays behind, in ")


def test_other_depths_are_read_and_written(make_gpt2, tmp_path):
    make_gpt2(num_hidden_layers=1).save_pretrained(tmp_path / "one")  # DistilGPT-2 has six instead of twelve
    make_gpt2(num_hidden_layers=11).save_pretrained(tmp_path / "eleven")  # h.10 comes before h.2

    for depth in ("one", "eleven"):
        convert(tmp_path / depth, tmp_path / f"{depth}.bin", "llm.c")
        convert(tmp_path / f"{depth}.bin", tmp_path / f"{depth} again", "gpt2", verify=True)
        first, last = (load_file(tmp_path / name / "model.safetensors") for name in (depth, f"{depth} again"))
        assert first.keys() == last.keys()
        assert all(torch.equal(last[name], each) for name, each in first.items())


def test_a_written_gpt2_says_what_llama_cpps_converter_reads(make_gpt2, tmp_path):
    make_gpt2().save_pretrained(tmp_path / "gpt2")

    convert(tmp_path / "gpt2", tmp_path / "out", "gpt2")

    config = json.loads((tmp_path / "out/config.json").read_text())
    wanted = {"n_layer": 2, "n_ctx": 64, "n_embd": 32, "n_head": 4, "layer_norm_epsilon": 1e-5}
    assert {name: config[name] for name in wanted} == wanted
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")  # tied, as its loader expects
