"""`hfgpt verify` says yes to the same model in another layout, and no to anything else."""

import json
import math
import re
from dataclasses import asdict, replace

import pytest
import torch
from transformers import GPT2Config

from hfgpt import HFGPTForCausalLM
from hfgpt.cli import main
from hfgpt.evaluation import verify_gpt2
from hfgpt.evaluation.verify_gpt2 import (
    SIZES,
    compare,
    memory_needed,
    random_gpt2,
    render,
    shape_of,
    verify,
    verify_random,
)


def draw(seed=0, **changes):
    """A small GPT-2 whose greedy text is not one repeated token."""
    shape = {"vocab_size": 1000, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4} | changes
    return random_gpt2(GPT2Config(**shape, bos_token_id=None, eos_token_id=None), seed)


@pytest.fixture
def gpt2_folder(tmp_path):
    draw().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_a_gpt2_folder_passes(gpt2_folder):
    result = verify(gpt2_folder)

    assert result.passed
    assert result.max_abs_diff <= result.tolerance
    assert result.argmax_agreement == 1
    assert result.loss_diff <= 1e-6
    assert result.greedy_equal
    assert result.greedy_distinct > 5  # a text of one repeated token would be equal too easily
    assert result.depth == 2
    assert result.bf16_disagreement is result.reference_bf16_disagreement is None


def test_an_hfgpt_folder_passes(gpt2_folder, tmp_path):
    HFGPTForCausalLM.from_pretrained(gpt2_folder).save_pretrained(tmp_path / "hfgpt")

    ours = verify(tmp_path / "hfgpt")

    assert ours.passed
    assert asdict(ours) == asdict(verify(gpt2_folder))


def test_a_file_of_another_format_is_sent_to_convert(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"")

    with pytest.raises(ValueError, match=r"model\.pth is a file.*`hfgpt convert --verify` compares files"):
        verify_gpt2.verify(tmp_path / "model.pth")


def test_models_in_bf16_are_no_further_off_than_the_reference(gpt2_folder):
    result = verify(gpt2_folder, bf16=True)

    assert result.passed
    assert 0 < result.bf16_disagreement <= 1.2 * result.reference_bf16_disagreement < 0.1
    assert "bf16 argmax" in render(result)


def swap(model, first, second):
    kept = first.data.clone()
    first.data.copy_(second.data)
    second.data.copy_(kept)


DISTURBANCES = {
    "a weight": lambda model: model.model.layers[1].mlp.up_proj.weight.data[3].add_(1e-3),
    "a bias": lambda model: model.model.layers[0].self_attn.v_proj.bias.data.add_(1e-3),
    "a query bias": lambda model: model.model.layers[0].self_attn.q_proj.bias.data.add_(1e-3),
    "a gain": lambda model: model.model.norm.weight.data.add_(1e-3),
    "a position": lambda model: model.model.embed_positions.weight.data[5, 0].add_(1e-3),
    "exchanged norms": lambda model: swap(
        model, model.model.layers[0].input_layernorm.weight, model.model.layers[0].post_attention_layernorm.weight
    ),
    "exchanged norm biases": lambda model: swap(
        model, model.model.layers[1].input_layernorm.bias, model.model.layers[1].post_attention_layernorm.bias
    ),
    "exchanged query and key": lambda model: swap(
        model, model.model.layers[0].self_attn.q_proj.bias, model.model.layers[0].self_attn.k_proj.bias
    ),
    "a number that is none": lambda model: model.model.layers[0].mlp.down_proj.bias.data[0].fill_(math.nan),
}


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_another_model_fails(make_twins, disturbance):
    gpt2, model = make_twins()
    assert compare(model, gpt2, bf16=False).passed

    DISTURBANCES[disturbance](model)

    result = compare(model, gpt2, bf16=False)
    assert not result.passed
    assert not result.max_abs_diff <= result.tolerance
    assert render(result).endswith("FAILED: outside the bounds")


@pytest.mark.parametrize("spoilt", ["eager", "sdpa"])
@pytest.mark.parametrize("factor", [math.nan, 1.001])
def test_logits_that_are_wrong_in_one_attention_alone_fail(make_twins, spoilt, factor):
    gpt2, model = make_twins()

    def spoil(module, args, output):
        return output * factor if model.config._attn_implementation == spoilt else output

    model.lm_head.register_forward_hook(spoil)

    result = compare(model, gpt2, bf16=False)

    assert not result.max_abs_diff <= result.tolerance
    assert not result.passed


def test_a_loss_of_another_kind_fails(make_twins):
    gpt2, model = make_twins()
    right = model.loss_function
    model.loss_function = lambda **arguments: right(**arguments) + 1e-3

    result = compare(model, gpt2, bf16=False)

    assert result.loss_diff == pytest.approx(1e-3, rel=0.01)
    assert not result.passed


def test_a_greedy_text_that_differs_fails(make_twins, monkeypatch):
    gpt2, model = make_twins()
    greedy = verify_gpt2.decoding.generate

    def generate(*args, **settings):
        text = greedy(*args, **settings)
        text[0, -1] = (text[0, -1] + 1) % 320
        return text

    monkeypatch.setattr(verify_gpt2.decoding, "generate", generate)

    result = compare(model, gpt2, bf16=False)

    assert not result.greedy_equal
    assert not result.passed
    assert "DIFFERENT" in render(result)


def test_the_reference_differs_from_itself_by_rounding_only(gpt2_folder):
    result = verify(gpt2_folder)

    assert 0 < result.reference_spread < result.tolerance
    assert f"{result.reference_spread:.2e}" in render(result)


def test_random_weights_of_a_size_pass_at_reduced_depth_which_is_said(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["hfgpt", "verify", "--random", "small", "--layers", "1"])

    with pytest.raises(SystemExit) as ended:
        main()

    said = capsys.readouterr()
    assert ended.value.code == 0
    assert "at reduced depth: 1 of the 12 blocks of small" in said.err
    assert said.out.startswith(f"{124_439_808 - 11 * 7_087_872:,} parameters, 1 blocks, fp32, eager and sdpa\n")
    assert said.out.endswith("passed: the same model\n")
    assert int(re.search(r"\((\d+) different tokens in it\)", said.out)[1]) > 5


@pytest.mark.slow
def test_random_weights_of_gpt2_small_pass():
    result = verify_random("small")

    assert result.passed
    assert result.parameters == 124_439_808
    assert result.argmax_agreement == 1
    assert result.greedy_distinct > 5


def test_every_parameter_of_a_random_model_is_drawn():
    for name, parameter in draw().state_dict().items():
        is_gain = name.split(".")[-2].startswith("ln_") and name.endswith("weight")
        assert float(parameter.mean()) == pytest.approx(float(is_gain), abs=0.1), name
        assert float(parameter.std()) == pytest.approx(0.1, rel=0.5), name


def test_a_seed_fixes_the_random_weights():
    first, again, other = (draw(seed).state_dict() for seed in (0, 0, 1))

    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.parametrize("size", SIZES)
def test_memory_for_both_models_is_asked_for(size):
    parameters = {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080, "xl": 1_557_611_200}[size]

    needed = memory_needed(size)

    both_in_fp32 = 2 * 4 * parameters
    assert both_in_fp32 < needed < both_in_fp32 + 1e9
    assert memory_needed(size, layers=1) < needed


@pytest.mark.parametrize(
    ("size", "layers", "message"),
    [
        ("tiny", None, r"`--random` must be one of \['small', 'medium', 'large', 'xl'\], got 'tiny'"),
        ("small", 0, r"`--layers` must be between 1 and 12 for 'small', got 0"),
        ("small", 13, r"`--layers` must be between 1 and 12 for 'small', got 13"),
    ],
)
def test_a_size_or_depth_that_is_not_there_is_refused(size, layers, message):
    for function in (verify_random, memory_needed, shape_of):
        with pytest.raises(ValueError, match=message):
            function(size, layers)


def test_json_has_the_names_that_stay(gpt2_folder):
    result = json.loads(json.dumps(asdict(verify(gpt2_folder))))

    names = {"max_abs_diff", "max_rel_diff", "argmax_agreement", "loss_diff", "greedy_equal", "passed"}
    assert names <= set(result)
    assert result["max_rel_diff"] <= result["max_abs_diff"]


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is no model folder: it has no config\.json"):
        verify(tmp_path)


@pytest.mark.parametrize("junk", [b"", b"junk", None])
def test_a_damaged_file_is_refused(gpt2_folder, junk):
    path = gpt2_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000] if junk is None else junk)

    with pytest.raises(ValueError, match="Error while deserializing header"):
        verify(gpt2_folder)


def test_a_config_with_a_value_of_another_type_is_refused(gpt2_folder):
    config = json.loads((gpt2_folder / "config.json").read_text())
    (gpt2_folder / "config.json").write_text(json.dumps({**config, "n_embd": "wide"}))

    with pytest.raises(ValueError, match=r"Field 'hidden_size' expected int, got str \(value: 'wide'\)"):
        verify(gpt2_folder)


def test_a_difference_within_the_references_own_spread_still_fails_and_says_so(gpt2_folder):
    result = replace(verify(gpt2_folder), max_abs_diff=2e-3, reference_spread=3e-3, passed=False)

    assert "FAILED: outside the bounds, though nearer to the reference" in render(result)
    assert render(replace(result, greedy_equal=False)).endswith("FAILED: outside the bounds")
