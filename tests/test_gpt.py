import copy
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.activations import ACT2FN

import hfgpt
from hfgpt.gpt import ACTIVATIONS, GPT, causal_mask, eager_attention
from hfgpt.modeling_hfgpt import HFGPTForCausalLM

WITHOUT_TRANSFORMERS = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ImportError(name)

sys.meta_path.insert(0, Block())
from types import SimpleNamespace
import torch
from hfgpt import GPT
from hfgpt.gpt import GPT as same

config = SimpleNamespace(
    vocab_size=11, max_position_embeddings=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=None, activation_function="gelu_new", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    layer_norm_epsilon=1e-5, initializer_range=0.02, tie_word_embeddings=True,
)
print(GPT is same, tuple(GPT(config)(torch.arange(6).view(2, 3)).shape), "transformers" in sys.modules)
"""


@pytest.fixture
def ids():
    return torch.randint(320, (3, 20), generator=torch.Generator().manual_seed(0))


def test_gpt_runs_where_transformers_cannot_be_imported():
    root = Path(hfgpt.__file__).parents[1]

    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRANSFORMERS], cwd=root, capture_output=True, text=True, check=False
    )

    assert done.stdout == "True (2, 3, 11) False\n", done.stderr


@pytest.mark.parametrize("tied", [True, False])
def test_one_seed_gives_both_models_the_same_tensors(tiny, tied):
    config = hfgpt.HFGPTConfig(**tiny, tie_word_embeddings=tied)

    torch.manual_seed(5)
    plain = GPT(config).state_dict()
    torch.manual_seed(5)
    wrapped = {name.removeprefix("model."): value for name, value in HFGPTForCausalLM(config).state_dict().items()}

    assert list(plain) == list(wrapped)
    assert all(torch.equal(plain[name], wrapped[name]) for name in plain)


@pytest.mark.parametrize("make", [GPT, HFGPTForCausalLM])
def test_initial_weights_are_spread_as_gpt2s(tiny, make):
    layers, std = 3, 0.02
    config = hfgpt.HFGPTConfig(**{**tiny, "hidden_size": 256, "num_hidden_layers": layers}, tie_word_embeddings=False)
    torch.manual_seed(0)

    model = make(config)

    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            start = 1.0 if name.endswith("norm.weight") else 0.0
            assert torch.equal(parameter, torch.full_like(parameter, start)), name
        else:
            expected = std / math.sqrt(2 * layers) if "o_proj" in name or "down_proj" in name else std
            # 16,384 draws or more: the measured deviation is within 3 % of the true one, five times its own spread.
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
            assert parameter.mean().item() == pytest.approx(0, abs=5 * expected / parameter.numel() ** 0.5), name


def test_initializer_range_scales_every_matrix(tiny):
    first, second = (
        (torch.manual_seed(0), GPT(hfgpt.HFGPTConfig(**tiny, initializer_range=std)))[1] for std in (0.02, 0.2)
    )

    for (name, small), large in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(large, small * 10 if small.ndim == 2 else small, msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_equal_the_wrapped_models(make_twins, ids, attention):
    _, model = make_twins(attention)
    plain = GPT(model.config).eval()
    plain.load_state_dict({name.removeprefix("model."): value for name, value in model.state_dict().items()})

    torch.testing.assert_close(plain(ids), model(ids).logits, rtol=0, atol=2e-5)  # sums in another order


def test_any_object_with_the_fields_is_a_config(tiny_config, ids):
    torch.manual_seed(0)
    expected = GPT(tiny_config).eval()
    torch.manual_seed(0)

    plain = GPT(SimpleNamespace(**tiny_config.to_dict())).eval()

    assert torch.equal(plain(ids), expected(ids))


def test_changing_a_token_leaves_earlier_logits_as_they_were(tiny_config, ids):
    model = GPT(tiny_config).eval()
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 320

    before, after = model(ids), model(changed)

    assert torch.equal(before[:, :7], after[:, :7])  # the very same sums
    assert not torch.isclose(before[0, 7:], after[0, 7:]).all(dim=-1).any()
    assert torch.equal(before[1:], after[1:])


@pytest.mark.parametrize("dropped", [{}, {"embd_pdrop": 0.5}, {"attn_pdrop": 0.5}, {"resid_pdrop": 0.5}])
def test_dropout_strikes_where_gpt2s_does(make_twins, ids, dropped):
    none = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    gpt2, model = make_twins("eager", **{**none, **dropped})
    plain = GPT(model.config)
    plain.load_state_dict({name.removeprefix("model."): value for name, value in model.state_dict().items()})
    logits = []

    for candidate in (gpt2, model, plain):
        candidate.train()
        torch.manual_seed(3)  # masks are drawn in the order and the shapes in which dropout is applied
        output = candidate(ids)
        logits.append(output if candidate is plain else output.logits)

    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=5e-5)
    torch.testing.assert_close(logits[2], logits[0], rtol=0, atol=5e-5)
    at_rest = copy.deepcopy(plain).eval()(ids)
    assert torch.allclose(logits[2], at_rest) == (not dropped)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_what_transformers_means_by_its_name(name):
    x = torch.linspace(-8, 8, 1001)

    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), rtol=1e-5, atol=1e-6)


def test_eager_attention_equals_torchs():
    query, key, value = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = causal_mask(6, torch.float32, query.device)

    attended, weights = eager_attention(torch.nn.Identity(), query, key, value, mask, scaling=0.3)

    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
    torch.testing.assert_close(attended.transpose(1, 2), expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6))
    assert torch.equal(weights, weights.tril())


def test_a_sequence_longer_than_the_positions_is_refused(tiny_config):
    model = GPT(tiny_config)
    model(torch.zeros(1, 64, dtype=torch.long))

    with pytest.raises(ValueError, match=r"65 tokens.*`max_position_embeddings` \(64\)"):
        model(torch.zeros(1, 65, dtype=torch.long))


def test_heads_that_do_not_divide_the_width_are_refused(tiny_config):
    fields = SimpleNamespace(**{**tiny_config.to_dict(), "num_attention_heads": 5})

    with pytest.raises(ValueError, match=r"`hidden_size` \(32\) is not divisible by `num_attention_heads` \(5\)"):
        GPT(fields)


def test_an_unknown_activation_is_refused(tiny):
    with pytest.raises(ValueError, match=r"`activation_function` must be one of \['gelu_new'.*got 'gleu'"):
        GPT(hfgpt.HFGPTConfig(**tiny, activation_function="gleu"))


def test_a_model_in_bf16_stays_in_bf16(tiny_config, ids):
    model = GPT(tiny_config).to(torch.bfloat16)

    assert model(ids).dtype == torch.bfloat16
