import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hfgpt import HFGPTConfig, HFGPTForCausalLM, HFGPTModel
from hfgpt.weights import load, save, to_gpt2
from hfgpt.weights.formats import gpt2 as table
from hfgpt.weights.formats.gpt2 import entries, to_gpt2_config
from hfgpt.weights.table import export_tensors, import_tensors

SIZES = {  # layers, heads, width and the number of parameters
    "small": (12, 12, 768, 124_439_808),
    "medium": (24, 16, 1024, 354_823_168),
    "large": (36, 20, 1280, 774_030_080),
    "xl": (48, 25, 1600, 1_557_611_200),
}


@pytest.fixture
def ids():
    return torch.randint(320, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def edit(make_gpt2, tmp_path):
    """A function that saves a random GPT-2, changes the tensors of its file, and returns the GPT-2 and the folder."""

    def edit(change, **config_changes):
        gpt2 = make_gpt2(**config_changes)
        gpt2.save_pretrained(tmp_path / "edited")
        file = tmp_path / "edited/model.safetensors"
        tensors = load_file(file)
        save_file(change(tensors), file, metadata={"format": "pt"})
        return gpt2, tmp_path / "edited"

    return edit


def file_tensors(model):
    """What a checkpoint of the model holds: one tensor per parameter."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def from_gpt2_tensors(tensors, num_layers):
    """GPT-2's tensors imported by the table."""
    (vocab_size, width), positions = tensors["transformer.wte.weight"].shape, len(tensors["transformer.wpe.weight"])
    config = HFGPTConfig(vocab_size=vocab_size, n_positions=positions, n_embd=width, n_head=1, n_layer=num_layers)
    with torch.device("meta"):
        shapes = {name: tuple(each.shape) for name, each in HFGPTForCausalLM(config).state_dict().items()}
    return import_tensors(entries(num_layers, tied=True), tensors, shapes)[0]


def to_gpt2_tensors(tensors, num_layers, tied):
    """hfgpt's tensors exported by the table."""
    return export_tensors(entries(num_layers, tied), tensors)[0]


def assert_same_tensors(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def assert_same_logits(gpt2, model, ids):
    expected = gpt2(ids).logits
    # Products and sums come in another order (Conv1D, one matrix for q, k and v): fp32 noise, in proportion.
    bound = 2e-5 * max(1.0, expected.abs().max().item() / 3)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("tied", [True, False])
def test_map_covers_every_parameter_exactly_once(make_twins, tied):
    gpt2, model = make_twins(tie_word_embeddings=tied)

    rows = entries(num_layers=2, tied=tied)

    assert sorted(row.foreign for row in rows) == sorted(file_tensors(gpt2))
    assert sorted(name for row in rows for name in row.hfgpt) == sorted(file_tensors(model))


@pytest.mark.parametrize("name", SIZES)
def test_all_four_sizes_fit(name):
    layers, heads, width, count = SIZES[name]
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=heads, n_embd=width))
        model = HFGPTForCausalLM(HFGPTConfig(n_layer=layers, n_head=heads, n_embd=width))

    mapped = from_gpt2_tensors(file_tensors(gpt2), num_layers=layers)

    assert model.num_parameters() == sum(tensor.numel() for tensor in mapped.values()) == count
    assert {key: value.shape for key, value in mapped.items()} == {
        key: value.shape for key, value in file_tensors(model).items()
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"n_inner": 48},
        {"n_head": 1, "n_layer": 3},
        {"layer_norm_epsilon": 1e-2},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_logits_equal_gpt2(make_twins, ids, attention, changes):
    gpt2, model = make_twins(attention, **changes)

    assert_same_logits(gpt2, model, ids)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_equal_gpt2_with_padding(make_twins, ids, attention, side):
    gpt2, model = make_twins(attention)
    hidden = torch.arange(20) >= torch.tensor([[20], [13], [5]])
    mask = (~hidden if side == "right" else ~hidden.flip(1)).long()

    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # GPT-2 does not derive them by itself
    expected = gpt2(ids, attention_mask=mask, position_ids=positions).logits
    logits = model(ids, attention_mask=mask).logits

    torch.testing.assert_close(logits[mask == 1], expected[mask == 1], rtol=0, atol=2e-5)


def test_both_routes_give_the_same_bits(make_twins):
    gpt2, model = make_twins()

    assert_same_tensors(from_gpt2_tensors(file_tensors(gpt2), num_layers=2), file_tensors(model))


def without_prefix(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_mask_buffers(tensors):
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril().bool() for layer in range(2)}
    return {**tensors, **masks, **{f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}}


def with_the_tied_head_again(tensors):
    return {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}


@pytest.mark.parametrize(
    "change",
    [
        without_prefix,
        with_mask_buffers,
        lambda tensors: without_prefix(with_mask_buffers(tensors)),  # openai-community/gpt2 is of this kind
        with_the_tied_head_again,
    ],
    ids=["without prefix", "mask buffers", "mask buffers without prefix", "tied head again"],
)
def test_every_kind_of_gpt2_file_is_read(edit, ids, change):
    gpt2, folder = edit(change)

    model = HFGPTForCausalLM.from_pretrained(folder)

    assert_same_tensors(to_gpt2_tensors(file_tensors(model), num_layers=2, tied=True), file_tensors(gpt2))
    assert_same_logits(gpt2, model, ids)
    base = HFGPTModel.from_pretrained(folder)
    assert_same_tensors(file_tensors(base), file_tensors(model.model))


def test_an_old_bin_file_is_read(make_gpt2, tmp_path):
    gpt2 = make_gpt2()
    gpt2.config.save_pretrained(tmp_path)
    torch.save(with_mask_buffers(gpt2.state_dict()), tmp_path / "pytorch_model.bin")

    model = HFGPTForCausalLM.from_pretrained(tmp_path)

    assert_same_tensors(to_gpt2_tensors(file_tensors(model), num_layers=2, tied=True), file_tensors(gpt2))


def test_a_sharded_gpt2_is_read(make_gpt2, tmp_path):
    gpt2 = make_gpt2(tie_word_embeddings=False)
    gpt2.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 2

    model = HFGPTForCausalLM.from_pretrained(tmp_path)

    assert_same_tensors(to_gpt2_tensors(file_tensors(model), num_layers=2, tied=False), file_tensors(gpt2))


def test_a_file_of_the_base_model_alone_is_read(make_gpt2, tmp_path):
    gpt2 = make_gpt2()
    gpt2.transformer.save_pretrained(tmp_path)

    model = HFGPTForCausalLM.from_pretrained(tmp_path)

    assert_same_tensors(to_gpt2_tensors(file_tensors(model), num_layers=2, tied=True), file_tensors(gpt2))


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def replaced(name, shape):
    return lambda tensors: {**tensors, name: torch.zeros(shape)}


MISFITS = {
    "missing": (without("transformer.h.1.ln_2.bias"), r"layers\.1\.post_attention_layernorm\.bias: not in the file"),
    "missing of three": (
        without("transformer.h.1.attn.c_attn.weight"),
        r"layers\.1\.self_attn\.k_proj\.weight: not in the file \(and 2 more\)",
    ),
    "missing embedding": (without("transformer.wte.weight"), r"embed_tokens\.weight: not in the file"),
    "left over": (
        replaced("transformer.h.1.attn.q_norm.weight", 32),
        r"layers\.1\.attn\.q_norm\.weight: in the file, not in the model",
    ),
    "left over layer": (
        replaced("transformer.h.2.ln_1.bias", 32),
        r"layers\.2\.input_layernorm\.bias: in the file, not in the model",
    ),
    "left over head": (replaced("v_head.summary.weight", (1, 32)), r"v_head\.summary\.weight: in the file"),
    "wrong shape": (
        replaced("transformer.ln_f.weight", 31),
        r"norm\.weight: in the file \(31,\), in the model \(32,\)",
    ),
    "wrong shape of three": (
        replaced("transformer.h.0.attn.c_attn.weight", (32, 90)),
        r"layers\.0\.self_attn\.k_proj\.weight: in the file \(30, 32\), in the model \(32, 32\) \(and 2 more\)",
    ),
    "not transposed": (
        replaced("transformer.h.0.mlp.c_fc.weight", (128, 32)),
        r"layers\.0\.mlp\.up_proj\.weight: in the file \(32, 128\), in the model \(128, 32\)",
    ),
    "two heads, though tied": (replaced("lm_head.weight", (320, 32)), r"lm_head\.weight: .*`tie_word_embeddings`"),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "no prefix"])
def test_a_file_that_does_not_fit_is_refused_by_the_tensors_name(edit, misfit, prefix):
    change, message = MISFITS[misfit]
    _, folder = edit(change if prefix else lambda tensors: without_prefix(change(tensors)))

    with pytest.raises(ValueError, match=message):
        HFGPTForCausalLM.from_pretrained(folder)


def test_an_untied_head_must_be_in_the_file(edit):
    _, folder = edit(without("lm_head.weight"), tie_word_embeddings=False)

    with pytest.raises(ValueError, match=r"lm_head\.weight: not in the file"):
        HFGPTForCausalLM.from_pretrained(folder)


def test_a_refused_load_leaves_nothing_behind(edit, make_twins, ids):
    _, folder = edit(without("transformer.h.1.ln_2.bias"))
    config = HFGPTConfig.from_pretrained(folder)
    before, mapping = copy.deepcopy(config.to_dict()), repr(table.import_mapping())
    random_state, dtype = torch.get_rng_state(), torch.get_default_dtype()

    with pytest.raises(ValueError, match="post_attention_layernorm"):
        HFGPTForCausalLM.from_pretrained(folder, config=config, dtype=torch.bfloat16)

    assert config.to_dict() == before
    assert repr(table.import_mapping()) == mapping
    assert torch.get_default_dtype() == dtype
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.zeros(1).device.type == "cpu"  # not meta, on which weights are loaded
    gpt2, _ = make_twins()
    gpt2.save_pretrained(folder)
    for _ in range(2):
        assert_same_logits(gpt2, HFGPTForCausalLM.from_pretrained(folder, config=config), ids)


def test_a_caller_who_asks_for_a_report_gets_one_instead_of_a_refusal(edit):
    _, folder = edit(without("transformer.h.1.ln_2.weight"))

    model, report = HFGPTForCausalLM.from_pretrained(folder, output_loading_info=True)

    assert report["missing_keys"] == {"model.layers.1.post_attention_layernorm.weight"}
    assert model.config.model_type == "hfgpt"
    assert torch.equal(model.model.layers[1].post_attention_layernorm.weight, torch.ones(32))  # as in a new model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_identity(make_gpt2, tmp_path, tied, dtype):
    gpt2 = make_gpt2(tie_word_embeddings=tied).to(dtype)
    gpt2.save_pretrained(tmp_path / "gpt2")

    model = HFGPTForCausalLM.from_pretrained(tmp_path / "gpt2")
    save(model, tmp_path / "back", "gpt2")

    assert_same_tensors(load_file(tmp_path / "back/model.safetensors"), load_file(tmp_path / "gpt2/model.safetensors"))
    assert_same_tensors(GPT2LMHeadModel.from_pretrained(tmp_path / "back").state_dict(), gpt2.state_dict())
    again = HFGPTForCausalLM.from_pretrained(tmp_path / "back")
    assert_same_tensors(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_goes_out_as_gpt2(tiny, ids, tied):
    torch.manual_seed(0)
    model = HFGPTForCausalLM(HFGPTConfig(**tiny, tie_word_embeddings=tied, n_inner=48, activation_function="relu"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    model.generation_config.top_k = 7

    gpt2 = to_gpt2(model)

    assert type(gpt2) is GPT2LMHeadModel
    assert not gpt2.training
    assert gpt2.generation_config.top_k == 7
    assert (gpt2.lm_head.weight is gpt2.transformer.wte.weight) == tied
    assert_same_logits(gpt2, model, ids)
    places = [{parameter.data_ptr() for parameter in candidate.parameters()} for candidate in (gpt2, model)]
    assert places[0].isdisjoint(places[1])  # copies


def test_a_tie_that_was_broken_stays_broken_in_gpt2(make_twins, ids):
    _, model = make_twins()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)

    gpt2 = to_gpt2(model)

    assert gpt2.config.tie_word_embeddings is False
    assert_same_logits(gpt2, model, ids)


def test_every_field_goes_out_under_gpt2s_name(tiny):
    fields = {**tiny, "n_inner": 48, "activation_function": "relu", "layer_norm_epsilon": 1e-3, "use_cache": False}
    fields |= {"initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    fields |= {"attn_pdrop": 0.2, "embd_pdrop": 0.3, "resid_pdrop": 0.4, "tie_word_embeddings": False}
    config = HFGPTConfig(**fields)
    default = HFGPTConfig()

    gpt2 = to_gpt2_config(config)

    for name in fields.keys() & gpt2.to_dict().keys():
        assert getattr(gpt2, name) == getattr(config, name), name
    for alias in HFGPTConfig.attribute_map.keys() - {"num_key_value_heads"}:  # which GPT-2 does not have
        assert gpt2.to_dict()[alias] == getattr(config, alias) != getattr(default, alias), alias


@pytest.mark.parametrize("format", ["hfgpt", "gpt2"])
def test_what_is_saved_in_a_format_is_loaded_again(make_twins, tmp_path, format):
    _, model = make_twins()

    save(model, tmp_path / "saved", format)

    assert json.loads((tmp_path / "saved/config.json").read_text())["model_type"] == format
    again = load(tmp_path / "saved", dtype=torch.float64)
    assert not again.training
    assert_same_tensors(again.state_dict(), model.double().state_dict())


def test_no_such_model_or_format_is_refused(make_twins, tmp_path):
    with pytest.raises(ValueError, match=r"`format` must be one of \['gpt2', 'hfgpt', .*\], got 'onyx'"):
        save(make_twins()[1], tmp_path / "saved", "onyx")
    assert not (tmp_path / "saved").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is no model folder: it has no config\.json"):
        load(tmp_path / "empty")
    with pytest.raises(ValueError, match="no model 'nobody/nothing'"):
        load("nobody/nothing")


def test_the_table_refuses_what_it_cannot_account_for(make_twins):
    gpt2, model = (file_tensors(each) for each in make_twins())

    with pytest.raises(ValueError, match="foreign: left over"):
        from_gpt2_tensors({**gpt2, "foreign": torch.zeros(1)}, num_layers=2)
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.bias: not in the file"):
        from_gpt2_tensors(without("transformer.ln_f.bias")(gpt2), num_layers=2)
    with pytest.raises(ValueError, match="foreign: the format has no place for it"):
        to_gpt2_tensors({**model, "foreign": torch.zeros(1)}, num_layers=2, tied=True)
    with pytest.raises(ValueError, match=r"model\.norm\.bias: not in the model"):
        to_gpt2_tensors(without("model.norm.bias")(model), num_layers=2, tied=True)


def test_a_loaded_gpt2_is_hfgpts_own_from_then_on(make_twins, tmp_path, ids):
    gpt2, model = make_twins()
    assert model.config.model_type == "hfgpt"

    model.save_pretrained(tmp_path / "own")

    assert load_file(tmp_path / "own/model.safetensors").keys() == file_tensors(model).keys()
    assert json.loads((tmp_path / "own/config.json").read_text())["model_type"] == "hfgpt"
    assert_same_logits(gpt2, AutoModelForCausalLM.from_pretrained(tmp_path / "own"), ids)


@pytest.mark.hub
def test_the_real_gpt2_gives_the_same_logits():  # HF_HUB_OFFLINE=0 pytest -m hub
    reference = GPT2LMHeadModel.from_pretrained("openai-community/gpt2").eval()
    model = HFGPTForCausalLM.from_pretrained("openai-community/gpt2").eval()
    ids = torch.arange(1000, 1064)[None]

    assert model.num_parameters() == SIZES["small"][3]
    assert_same_logits(reference, model, ids)
    texts = [candidate.generate(ids, max_new_tokens=20, do_sample=False) for candidate in (reference, model)]
    assert torch.equal(*texts)
