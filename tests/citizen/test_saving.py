import pytest
import torch
from contract import ALL_CLASSES, SUM_ORDER, random_ids, scores
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hfgpt


@pytest.fixture
def ids():
    return random_ids(2, 20)


@pytest.fixture
def model(make, tmp_path):
    """A language model, saved in `tmp_path`."""
    model = make(hfgpt.HFGPTForCausalLM)
    model.save_pretrained(tmp_path)
    return model


def load(folder, **arguments):
    return hfgpt.HFGPTForCausalLM.from_pretrained(folder, **arguments)


def change_file(folder, changes):
    """Take tensors out of the saved file, or put others in."""
    tensors = load_file(folder / "model.safetensors") | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("model_class", ALL_CLASSES)
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_what_is_saved_is_loaded_to_the_last_bit(make, tmp_path, model_class, shard_size):
    model = make(model_class)

    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    again, info = model_class.from_pretrained(tmp_path, output_loading_info=True)

    assert (len([*tmp_path.glob("*.safetensors")]) > 1) == (shard_size == "20KB")
    assert not any(info.values())
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_a_device_map_may_be_given(model, ids, tmp_path, device_map):
    assert torch.equal(load(tmp_path, device_map=device_map)(ids).logits, model(ids).logits)


def test_blocks_may_be_kept_on_disk(model, ids, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.embed_positions": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}

    offloaded = load(tmp_path, device_map=places, offload_folder=tmp_path / "offloaded")

    assert offloaded.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(offloaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "auto"])
def test_a_dtype_may_be_given(model, tmp_path, dtype):
    again = load(tmp_path, dtype=dtype)

    expected = {"bfloat16": torch.bfloat16, torch.float16: torch.float16, "auto": torch.float32}[dtype]
    assert {parameter.dtype for parameter in again.parameters()} == {expected}
    assert again.config.dtype == expected


def test_from_config_makes_new_weights_of_the_dtype_asked_for(model):
    made = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16, attn_implementation="eager")

    assert type(made) is hfgpt.HFGPTForCausalLM
    assert made.dtype == torch.bfloat16
    assert made.config._attn_implementation == "eager"
    assert 0.015 < made.model.embed_tokens.weight.float().std() < 0.025


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.1.mlp.up_proj.bias": None}, r"layers\.1\.mlp\.up_proj\.bias: not in the file"),
        ({"model.layers.1.mlp.gate.weight": torch.ones(3)}, r"mlp\.gate\.weight: in the file, not in the model"),
        ({"model.layers.2.input_layernorm.bias": torch.ones(32)}, r"layers\.2\..*: in the file, not in the model"),
        ({"model.norm.weight": torch.ones(31)}, r"norm\.weight: in the file \(31,\), in the model \(32,\)"),
        ({"lm_head.weight": torch.ones(320, 32)}, r"lm_head\.weight: in the file, and not the token embedding"),
    ],
    ids=["missing", "left over", "of a block that is not there", "of another shape", "untied"],
)
@pytest.mark.parametrize("through", ["class", "auto class", "body"])
def test_tensors_that_do_not_fit_the_config_are_refused(model, tmp_path, changes, message, through):
    change_file(tmp_path, changes)
    loaders = {"class": hfgpt.HFGPTForCausalLM, "auto class": AutoModelForCausalLM, "body": hfgpt.HFGPTModel}
    if through == "body" and "lm_head.weight" in changes:
        loaders[through].from_pretrained(tmp_path)  # it has no output layer
        return

    with pytest.raises(ValueError, match=message):
        loaders[through].from_pretrained(tmp_path)


def test_who_asks_for_the_loading_info_gets_what_transformers_gives(model, tmp_path):
    change_file(tmp_path, {"model.layers.1.mlp.up_proj.bias": None, "model.extra": torch.ones(3)})

    _, info = load(tmp_path, output_loading_info=True)

    assert info["missing_keys"] == {"model.layers.1.mlp.up_proj.bias"}
    assert info["unexpected_keys"] == {"model.extra"}


def test_other_sizes_are_taken_when_the_caller_says_so(model, tmp_path):
    again = load(tmp_path, vocab_size=300, ignore_mismatched_sizes=True)

    assert again.lm_head.weight.shape == (300, 32)
    assert torch.equal(again.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


def test_a_state_dict_may_be_given_in_place_of_the_file(model, ids, tmp_path):
    tensors = {name: tensor * 2 for name, tensor in model.state_dict().items()}

    again = load(None, config=model.config, state_dict=tensors)

    assert torch.equal(again.model.norm.weight, model.model.norm.weight * 2)


def test_a_revision_may_be_pinned(make, ids, tmp_path, monkeypatch):
    cache = tmp_path / "models--someone--gpt"
    models = {}
    for name, scale in (("1" * 40, 1.0), ("2" * 40, 2.0)):
        models[name] = make(hfgpt.HFGPTForCausalLM)
        models[name].model.norm.weight.data.mul_(scale)
        models[name].save_pretrained(cache / "snapshots" / name)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("2" * 40)
    (cache / "refs" / "v1").write_text("1" * 40)

    for revision, name in ((None, "2" * 40), ("main", "2" * 40), ("v1", "1" * 40), ("1" * 40, "1" * 40)):
        again = load("someone/gpt", cache_dir=tmp_path, **({"revision": revision} if revision else {}))
        assert torch.equal(again(ids).logits, models[name](ids).logits)


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_a_model_moved_to_half_precision_and_back_from_disk_says_the_same(make, ids, tmp_path, model_class):
    model = make(model_class, pad_token_id=0).to(torch.bfloat16)

    model.save_pretrained(tmp_path)

    again = model_class.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    torch.testing.assert_close(scores(again(ids)), scores(model(ids)), **SUM_ORDER)
