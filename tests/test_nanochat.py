"""The second architecture: the network of nanochat beside transformers' own, and a folder that needs no code of ours.

What holds of every class alike is in citizen/, where these classes are too.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, NanoChatConfig

import hfgpt
from hfgpt import loss
from hfgpt.arguments import CACHE
from hfgpt.loss import IGNORE_INDEX, linear_cross_entropy
from hfgpt.modeling_nanochat import NanoChatForCausalLM
from hfgpt.nanochat import NanoChat
from hfgpt.weights import load, save, to_gpt2

SHAPE = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": 64}
SHAPE |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}

VARIANTS = {
    "as nanochat": {},
    "shared keys": {"num_key_value_heads": 2},
    "one head of keys": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "without a cap": {"final_logit_softcapping": None},
    "other constants": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 0.1},
}


@pytest.fixture
def make_pair(tmp_path):
    """A function that makes transformers' NanoChat, and hfgpt's with the same weights, so large that the cap shows."""

    def make_pair(attention="sdpa", scale=0.3, **changes):
        config = NanoChatConfig(**{**SHAPE, **changes})
        theirs = transformers.NanoChatForCausalLM._from_config(config, attn_implementation=attention).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.normal_(std=scale, generator=generator)
        theirs.save_pretrained(tmp_path / "theirs")
        return theirs, NanoChatForCausalLM.from_pretrained(tmp_path / "theirs", attn_implementation=attention).eval()

    return make_pair


@pytest.fixture
def ids():
    return torch.randint(1, 320, (3, 40), generator=torch.Generator().manual_seed(0))


def assert_same_logits(mine, theirs, rounding=2e-5):
    assert float(theirs.abs().max()) > 3
    assert float((mine - theirs).abs().max()) <= rounding * max(1.0, float(theirs.abs().max()) / 3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_are_those_of_transformers(make_pair, ids, attention, variant):
    theirs, ours = make_pair(attention, **VARIANTS[variant])
    plain = NanoChat(ours.config).eval()
    plain.load_state_dict({name.removeprefix("model."): tensor for name, tensor in ours.state_dict().items()})

    expected = theirs(ids).logits

    assert_same_logits(ours(ids).logits, expected)
    assert_same_logits(plain(ids), expected)


@torch.no_grad()
def test_logits_in_fp64_are_those_of_transformers_to_the_last_digits(make_pair, ids):
    theirs, ours = (each.double() for each in make_pair())

    # Norms and angles are fp32 in both, by the same operations.
    assert_same_logits(ours(ids).logits, theirs(ids).logits, rounding=1e-6)


@torch.no_grad()
def test_logits_in_bf16_are_as_far_from_those_in_fp32_as_those_of_transformers(make_pair, ids):
    theirs, ours = make_pair(scale=0.1)
    exact = theirs(ids).logits

    mine, reference = ((each.bfloat16()(ids).logits.float() - exact).square().mean().sqrt() for each in (ours, theirs))

    assert mine < 1.2 * reference
    assert mine < 0.02 * exact.square().mean().sqrt()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_cached_and_padded_step_is_that_of_transformers(make_pair, ids, attention):
    theirs, ours = make_pair(attention, num_key_value_heads=2)
    mask = torch.ones_like(ids)
    mask[0, :11] = mask[1, :3] = 0
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)  # transformers' does not find them itself
    caches, logits = [], []

    for model in (ours, theirs):
        begun = model(ids[:, :30], attention_mask=mask[:, :30], position_ids=positions[:, :30], use_cache=True)
        caches.append(begun[CACHE])
        step = {"attention_mask": mask, "position_ids": positions[:, 30:], CACHE: caches[-1]}
        logits.append(model(ids[:, 30:], **step).logits)

    assert_same_logits(*logits)
    for mine, theirs_ in zip(caches[0].layers, caches[1].layers, strict=True):
        kept = mask[:, None, :, None] == 1
        assert mine.keys.shape == (3, 2, 40, 8)
        torch.testing.assert_close(mine.keys * kept, theirs_.keys * kept, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 50},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "use_cache": False},
    ],
    ids=["greedy", "sampled", "beams", "static cache", "no cache"],
)
def test_generate_writes_what_transformers_writes(make_pair, ids, how):
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    texts = []

    for model in make_pair():
        torch.manual_seed(0)
        texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=20, **how))

    assert torch.equal(*texts)
    assert all(len(set(row[40:].tolist())) > 5 for row in texts[0])


@pytest.mark.parametrize("skip_logits", [False, True])
def test_loss_and_gradients_are_those_of_transformers(make_pair, ids, skip_logits):
    theirs, ours = make_pair()
    labels = ids.masked_fill(ids % 7 == 0, IGNORE_INDEX)

    expected, found = theirs(ids, labels=labels).loss, ours(ids, labels=labels, skip_logits=skip_logits).loss
    expected.backward()
    found.backward()

    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        scale = float(other.grad.abs().max())
        # transformers' class learns nothing of the pad token, which hfgpt does not know to be one in a text.
        torch.testing.assert_close(mine.grad[1:], other.grad[1:], rtol=0, atol=1e-5 * max(1.0, scale), msg=name)


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_of_capped_logits_and_its_gradients_are_those_of_autograd_in_fp64(monkeypatch, chunk, dtype):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(20, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    weight = (3 * torch.randn(31, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(31, (20,), generator=generator)
    targets[:3] = IGNORE_INDEX
    exact = F.cross_entropy(15 * torch.tanh(hidden @ weight.T / 15), targets, ignore_index=IGNORE_INDEX)
    expected = torch.autograd.grad(exact, (hidden, weight))

    inputs = [each.detach().to(dtype).requires_grad_() for each in (hidden, weight)]
    found = linear_cross_entropy(*inputs, targets, softcap=15.0)

    assert (hidden @ weight.T).abs().max().item() > 30  # where the cap's slope is nearly 0
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)
    for mine, other in zip(torch.autograd.grad(found, inputs), expected, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=1e-6)


def test_the_loss_of_capped_logits_compiles_to_the_same():
    hidden, weight = torch.randn(20, 6, requires_grad=True), torch.randn(31, 6, requires_grad=True)
    targets = torch.randint(31, (20,))
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)

    results = []
    for function in (linear_cross_entropy, compiled):
        value = function(hidden, weight, targets, softcap=2.0)
        results.append((value.detach(), *torch.autograd.grad(value, (hidden, weight))))

    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("tied", [False, True])
def test_one_seed_gives_the_plain_network_and_the_model_the_same_weights(tied):
    config = NanoChatConfig(**SHAPE, tie_word_embeddings=tied)
    torch.manual_seed(5)
    plain = NanoChat(config)
    torch.manual_seed(5)
    model = NanoChatForCausalLM(config)

    weights = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    assert weights.keys() == plain.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.state_dict().items())


def test_a_new_model_begins_as_nanochats_authors_let_theirs_begin(ids):
    model = NanoChatForCausalLM(NanoChatConfig(**{**SHAPE, "hidden_size": 128, "intermediate_size": 512}))
    weights = dict(model.named_parameters())

    for block in ("model.layers.0", "model.layers.1"):
        for name in ("self_attn.o_proj", "mlp.fc2"):
            assert not weights[f"{block}.{name}.weight"].any()
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"):
            weight = weights[f"{block}.{name}.weight"]
            assert weight.std().item() == pytest.approx(128**-0.5, rel=0.03)
            assert weight.abs().max().item() <= math.sqrt(3 / 128)
    assert weights["lm_head.weight"].std().item() == pytest.approx(0.001, rel=0.03)
    assert weights["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(320), abs=1e-3)


def test_a_saved_model_is_one_of_transformers_and_brings_no_code(ids, tmp_path):
    model = NanoChatForCausalLM(NanoChatConfig(**SHAPE)).eval()

    model.save_pretrained(tmp_path)

    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "nanochat"
    assert config["architectures"] == ["NanoChatForCausalLM"]
    assert "auto_map" not in config
    assert not [*tmp_path.glob("*.py")]
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is transformers.NanoChatForCausalLM
    assert not any(info.values())
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert type(load(tmp_path)) is NanoChatForCausalLM
    assert torch.equal(load(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_transformers_alone_loads_and_runs_it(tmp_path):
    NanoChatForCausalLM(NanoChatConfig(**SHAPE)).save_pretrained(tmp_path)
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "print(model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=4, do_sample=False).shape[1])\n"
        "assert 'hfgpt' not in sys.modules"
    )

    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(tmp_path))

    assert result.stdout.split() == ["7"], result.stderr


def test_importing_hfgpt_changes_nothing_of_transformers_own_nanochat():
    config = NanoChatConfig(**SHAPE)

    assert hfgpt.NanoChatForCausalLM is NanoChatForCausalLM
    assert type(AutoModelForCausalLM.from_config(config)) is transformers.NanoChatForCausalLM
    assert type(transformers.AutoModel.from_config(config)) is transformers.NanoChatModel


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "`hidden_act` is 'gelu': of nanochat hfgpt builds 'relu2' only"),
        ({"attention_bias": True}, "`attention_bias` is True"),
        ({"head_dim": 16}, "`head_dim` is 16: of nanochat hfgpt builds 8 only"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type` is 'linear'",
        ),
        ({"num_attention_heads": 3}, "`num_attention_heads` .`n_head`, 3."),
        ({"num_attention_heads": 32}, "an even number"),
        ({"num_key_value_heads": 3}, "no multiple of `num_key_value_heads` .3."),
        ({"attention_dropout": 1.5}, "`attention_dropout` must be between 0 and 1, got 1.5"),
        ({"final_logit_softcapping": 0.0}, "`final_logit_softcapping` must be finite and above 0"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1, got 0"),
    ],
)
def test_what_is_another_network_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        NanoChatForCausalLM(NanoChatConfig(**{**SHAPE, **changes}))


def test_a_folder_of_another_network_is_refused_before_its_weights_are_read(tmp_path):
    model = transformers.NanoChatForCausalLM(NanoChatConfig(**SHAPE, attention_bias=True))
    model.save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="`attention_bias` is True: of nanochat hfgpt builds False only"):
        load(tmp_path)


def test_formats_that_hold_gpt2s_network_refuse_a_nanochat(tmp_path):
    model = NanoChatForCausalLM(NanoChatConfig(**SHAPE))
    gpt2 = hfgpt.HFGPTForCausalLM(hfgpt.HFGPTConfig(vocab_size=320, n_embd=8, n_head=2, n_layer=1))

    for name in ("hfgpt", "gpt2", "nanogpt", "llms-from-scratch", "llm.c", "openai"):
        with pytest.raises(ValueError, match=f"network of nanochat, which the format '{name}' cannot hold"):
            save(model, tmp_path / "new", name)
    with pytest.raises(ValueError, match="network of nanochat, which the format 'gpt2' cannot hold"):
        to_gpt2(model)
    with pytest.raises(ValueError, match="network of GPT-2, which the format 'nanochat' cannot hold"):
        save(gpt2, tmp_path / "new", "nanochat")
    assert not [*tmp_path.iterdir()]
