import copy
import json

import pytest
import transformers
from transformers import AutoConfig, GPT2Config

from hfgpt import HFGPTConfig, HFGPTForCausalLM

ALIASES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "n_ctx": "max_position_embeddings",
}

# config.json of openai-community/gpt2, word for word.
OPENAI = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


@pytest.fixture
def write(tmp_path):
    """A function that writes a config.json and returns its folder."""

    def write(fields):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return tmp_path

    return write


@pytest.mark.parametrize(("alias", "field"), ALIASES.items())
def test_gpt2s_names_are_the_same_fields(alias, field):
    config = HFGPTConfig(**{alias: 24})

    assert getattr(config, field) == getattr(config, alias) == 24
    assert config.to_dict()[field] == 24
    assert alias not in config.to_dict()
    assert config == HFGPTConfig(**{field: 24})


@pytest.mark.parametrize(
    ("first", "second"),
    [*ALIASES.items(), *((field, alias) for alias, field in ALIASES.items()), ("n_ctx", "n_positions")],
)
def test_two_names_of_one_field_must_agree(first, second):
    assert getattr(HFGPTConfig(**{first: 24, second: 24}), first) == 24

    with pytest.raises(ValueError, match=rf"`{first}` \(24\) and `{second}` \(48\) are the same field"):
        HFGPTConfig(**{first: 24, second: 48})


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    [
        ("n_layers", "n_layer"),
        ("hidden_sise", "hidden_size"),
        ("attention_pdrop", "attn_pdrop"),
        ("vocabsize", "vocab_size"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_nearest_name(misspelt, nearest):
    with pytest.raises(ValueError, match=rf"^unknown field `{misspelt}`\. Did you mean `{nearest}`\?$"):
        HFGPTConfig(**{misspelt: 6})


@pytest.mark.parametrize("foreign", ["summary_type", "rope_theta", "zzz", "scale_attn_weights"])
def test_a_field_unlike_any_is_refused(foreign):
    with pytest.raises(ValueError, match=rf"^unknown field `{foreign}`\."):
        HFGPTConfig(**{foreign: True})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 30, "n_head": 4}, r"\(`n_embd`, 30\) is not divisible by `num_attention_heads` \(`n_head`, 4\)"),
        ({"n_layer": 0}, "`num_hidden_layers` must be at least 1, got 0"),
        ({"n_head": 0}, "`num_attention_heads` must be at least 1, got 0"),
        ({"vocab_size": -1}, "`vocab_size` must be at least 1, got -1"),
        ({"n_positions": 0}, "`max_position_embeddings` must be at least 1, got 0"),
        ({"n_inner": 0}, "`intermediate_size` must be at least 1, got 0"),
        ({"attn_pdrop": 1.5}, "`attn_pdrop` must be between 0 and 1, got 1.5"),
        ({"resid_pdrop": -0.1}, "`resid_pdrop` must be between 0 and 1, got -0.1"),
    ],
)
def test_an_impossible_shape_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HFGPTConfig(**fields)


def test_the_defaults_are_gpt2_small():
    config, gpt2 = HFGPTConfig(), GPT2Config()

    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function"):
        assert getattr(config, name) == getattr(gpt2, name), name
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "initializer_range", "use_cache"):
        assert getattr(config, name) == getattr(gpt2, name), name
    assert config.tie_word_embeddings is gpt2.tie_word_embeddings is True


def test_the_real_gpt2_config_is_read_as_it_is(write, caplog):
    config = HFGPTConfig.from_pretrained(write(OPENAI))

    for name in set(OPENAI) - {"model_type"}:
        if not name.startswith(("summary_", "task_")):
            assert getattr(config, name) == OPENAI[name], name
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for name in OPENAI:
        assert (name in record.message) == name.startswith(("summary_", "task_")), name
    assert config.task_specific_params == OPENAI["task_specific_params"]


def test_what_transformers_writes_for_its_gpt2_is_read_as_it_is(tiny, tmp_path):
    gpt2 = GPT2Config(**tiny, n_inner=48, activation_function="relu", bos_token_id=1, eos_token_id=2, pad_token_id=3)
    gpt2.save_pretrained(tmp_path)

    config = HFGPTConfig.from_pretrained(tmp_path)

    for name in (
        "vocab_size",
        *ALIASES.values(),
        "activation_function",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ):
        assert getattr(config, name) == (48 if name == "intermediate_size" else getattr(gpt2, name)), name


def test_a_gpt2_config_that_names_no_value_means_gpt2s(write):
    config, gpt2 = HFGPTConfig.from_pretrained(write({"model_type": "gpt2"})), GPT2Config()

    assert (config.bos_token_id, config.eos_token_id) == (gpt2.bos_token_id, gpt2.eos_token_id) == (50256, 50256)
    small = HFGPTConfig.from_pretrained(write({"model_type": "gpt2", "vocab_size": 100}))
    assert (small.bos_token_id, small.eos_token_id) == (None, None)  # 50256 is no token of such a model


@pytest.mark.parametrize(
    ("option", "harmless"),
    [
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("reorder_and_upcast_attn", False),
        ("add_cross_attention", False),
    ],
)
@pytest.mark.parametrize("model_type", ["gpt2", "hfgpt"])
def test_a_knob_that_changes_the_mathematics_is_refused(write, option, harmless, model_type):
    HFGPTConfig.from_pretrained(write({"model_type": model_type, option: harmless}))

    with pytest.raises(ValueError, match=f"`{option}` must be {harmless}"):
        HFGPTConfig.from_pretrained(write({"model_type": model_type, option: not harmless}))


@pytest.mark.parametrize("model_type", ["llama", "gpt_neo", "gpt2_xl"])
def test_another_model_type_is_refused(write, model_type):
    with pytest.raises(ValueError, match=f"`model_type` is '{model_type}'; hfgpt reads 'hfgpt' and 'gpt2' configs"):
        HFGPTConfig.from_pretrained(write({"model_type": model_type, "hidden_size": 64}))


def test_a_contradiction_in_a_file_is_refused(write):
    with pytest.raises(ValueError, match=r"`n_embd` \(768\) and `hidden_size` \(64\) are the same field"):
        HFGPTConfig.from_pretrained(write({**OPENAI, "hidden_size": 64}))


@pytest.mark.parametrize("model_type", ["gpt2", "hfgpt"])
def test_a_saved_config_is_hfgpts_own_and_loads_as_the_same(tiny, tmp_path, write, model_type):
    config = HFGPTConfig.from_pretrained(write({**tiny, "model_type": model_type, "eos_token_id": [3, 7]}))

    config.save_pretrained(tmp_path / "again")

    saved = json.loads((tmp_path / "again/config.json").read_text())
    assert saved["model_type"] == "hfgpt"
    assert {name: saved[name] for name in tiny} == tiny
    again = HFGPTConfig.from_pretrained(tmp_path / "again")
    assert again.model_type == "hfgpt"
    assert again.to_dict() == config.to_dict()
    assert type(AutoConfig.from_pretrained(tmp_path / "again")) is HFGPTConfig


NOTES = {"note": "x", "numbers": {"a": [1, 2.5, None]}, "_run": 7, "tokenizer_class": "GPT2Tokenizer"}


@pytest.mark.parametrize("name", NOTES)
def test_a_value_of_another_tool_survives_saving_and_loading_with_one_warning(tiny, tmp_path, caplog, name):
    config = HFGPTConfig(**tiny)
    setattr(config, name, NOTES[name])
    HFGPTForCausalLM(config).save_pretrained(tmp_path / "model")

    loaded = HFGPTForCausalLM.from_pretrained(tmp_path / "model")

    [record] = caplog.records
    assert record.message == f"Keys of config.json that hfgpt has no use for: {name}."
    loaded.save_pretrained(tmp_path / "again")
    for each in (loaded.config, AutoConfig.from_pretrained(tmp_path / "again"), copy.deepcopy(loaded.config)):
        assert getattr(each, name) == NOTES[name]
        assert each.to_dict()[name] == NOTES[name]


@pytest.mark.parametrize("name", ["sliding_window", "head_dim", "transformers_weights", "save_pretrained"])
@pytest.mark.parametrize("model_type", ["gpt2", "hfgpt"])
def test_what_transformers_would_act_upon_is_ignored_and_said_so(tiny, write, caplog, model_type, name):
    config = HFGPTConfig.from_pretrained(write({**tiny, "model_type": model_type, name: 4, "note": "x"}))

    assert getattr(config, name, None) != 4
    [record] = caplog.records
    assert record.message.endswith(f" Ignored of them: {name}.")
    assert config.note == "x"


def test_a_setting_of_generation_in_a_config_is_dropped_as_in_gpt2(tiny, write, tmp_path):
    config = HFGPTConfig.from_pretrained(write({**tiny, "model_type": "gpt2", "do_sample": True, "max_length": 50}))

    assert not hasattr(config, "max_length")
    config.save_pretrained(tmp_path / "again")  # transformers refuses to save one that has it


@pytest.mark.parametrize("model_type", ["gpt2", "hfgpt"])
def test_what_is_said_of_a_config_obeys_transformers_level(write, caplog, model_type):
    folder = write({**OPENAI, "model_type": model_type})
    transformers.logging.set_verbosity_error()
    try:
        HFGPTConfig.from_pretrained(folder)
    finally:
        transformers.logging.set_verbosity_warning()

    assert not caplog.records


@pytest.mark.parametrize(("n_ctx", "n_positions"), [(128, 1024), (2048, 1024), (128, None), (1024, 64)])
def test_gpt2s_n_ctx_has_no_effect_whatever_it_says(write, caplog, n_ctx, n_positions):
    fields = {"model_type": "gpt2", "n_ctx": n_ctx, **({} if n_positions is None else {"n_positions": n_positions})}

    config = HFGPTConfig.from_pretrained(write(fields))

    assert config.n_positions == GPT2Config(**fields).n_positions
    [record] = caplog.records
    assert f"`n_ctx` ({n_ctx}) is not `n_positions` ({config.n_positions})" in record.message


def test_fields_may_be_changed_while_loading(tiny, tmp_path):
    HFGPTConfig(**tiny).save_pretrained(tmp_path)

    config = HFGPTConfig.from_pretrained(tmp_path, attn_pdrop=0.0, n_positions=32)

    assert (config.attn_pdrop, config.max_position_embeddings, config.resid_pdrop) == (0.0, 32, 0.1)
