"""Muon: what it makes of a gradient, what it leaves to AdamW, and that a run with it goes on to the last bit."""

import pytest
import torch
import yaml
from runs import LOOPS, assert_same_path, assert_same_run, run, run_until_killed
from torch.optim import AdamW, _muon
from transformers import NanoChatConfig

from hfgpt import HFGPTConfig, HFGPTForCausalLM
from hfgpt.config.loading import load_config
from hfgpt.config.schema import OptimConfig
from hfgpt.modeling_nanochat import NanoChatForCausalLM
from hfgpt.results.records import read_results
from hfgpt.training.optim import make_optimizer, orthogonalize

NANOCHAT = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2}
NANOCHAT |= {"num_attention_heads": 2, "num_key_value_heads": 1}
MUON = ["optim.name=muon", "optim.muon_learning_rate=0.01", "optim.schedule=wsd", "optim.decay_share=0.6"]


@pytest.fixture
def in_fp32(monkeypatch):
    """Let torch's own Muon compute in fp32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.float().clone())


@pytest.mark.parametrize("shape", [(24, 24), (24, 32), (24, 96), (96, 24)])
@pytest.mark.usefixtures("in_fp32")
def test_matrices_are_made_orthogonal_as_by_torch(shape):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, *shape, generator=generator) * torch.logspace(0, -3, shape[1])

    found = orthogonalize(matrices)

    expected = [_muon._zeropower_via_newtonschulz(each, (3.4445, -4.7750, 2.0315), 5, 1e-7) for each in matrices]
    # The smallest singular values, of which a Gram matrix in fp32 knows little, are rounded differently.
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-3)
    assert torch.equal(orthogonalize(torch.zeros(1, *shape)), torch.zeros(1, *shape))


@pytest.mark.parametrize(
    "make",
    [
        lambda tiny: HFGPTForCausalLM(HFGPTConfig(**tiny)),
        lambda tiny: HFGPTForCausalLM(HFGPTConfig(**tiny, tie_word_embeddings=False)),
        lambda tiny: NanoChatForCausalLM(NanoChatConfig(**NANOCHAT)),
    ],
    ids=["tied", "untied", "nanochat"],
)
@pytest.mark.usefixtures("in_fp32")
def test_steps_are_those_of_torchs_muon_in_the_blocks_and_of_adamw_elsewhere(tiny, make):
    config = OptimConfig(name="muon", learning_rate=3e-3, muon_learning_rate=0.02, weight_decay=0.1)
    model, other = make(tiny), make(tiny)
    other.load_state_dict(model.state_dict())
    is_block = {name: ".layers." in name and each.ndim == 2 for name, each in other.named_parameters()}
    named = dict(other.named_parameters())
    decaying = [each for name, each in named.items() if not is_block[name] and each.ndim == 2]
    vectors = [each for each in named.values() if each.ndim == 1]
    theirs = [
        _muon.Muon([named[name] for name in named if is_block[name]], lr=0.02, weight_decay=0.1),
        AdamW([{"params": decaying}, {"params": vectors, "weight_decay": 0.0}], 3e-3, (0.9, 0.95), weight_decay=0.1),
    ]
    ours, generator = make_optimizer(model, config), torch.Generator().manual_seed(0)

    for _ in range(4):
        for mine, its in zip(model.parameters(), other.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            its.grad = mine.grad.clone()
        for optimizer in (ours, *theirs):
            optimizer.step()

    for (name, mine), its in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-5, msg=name)


def test_a_step_without_gradients_changes_nothing(tiny_config):
    model = HFGPTForCausalLM(tiny_config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    make_optimizer(model, OptimConfig(name="muon")).step()

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("architecture", ["gpt2", "nanochat"])
def test_both_loops_walk_the_same_path_with_muon_and_resume_on_it_to_the_last_bit(recipe, architecture):
    content, matrix = yaml.safe_load(recipe.read_text()), "model.layers.0.self_attn.q_proj.weight"
    if architecture == "nanochat":
        content["model"] = {"architecture": "nanochat", "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
        recipe.write_text(yaml.safe_dump(content))
    overrides = ["train.epochs=2", *MUON]
    whole = run(recipe, "whole", *overrides)

    state = torch.load(whole / "checkpoint-4" / "optimizer.pt")["state"]
    assert "momentum_buffer" in state[matrix]
    assert "exp_avg" in state["model.embed_tokens.weight"]
    for loop in LOOPS:
        run_until_killed(recipe, f"stopped-{loop}", 7, f"loop={loop}", *overrides)
        assert_same_run(whole, run(recipe, f"stopped-{loop}", f"loop={loop}", *overrides, resume=True))
    card = (whole / "README.md").read_text()
    assert "muon on the matrices of the blocks, learning rate 0.01, and adamw on the rest, learning rate 0.003" in card
    assert read_results(whole / "results.json")["run"]["optim"]["muon_learning_rate"] == 0.01


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.muon_learning_rate=0.1"], "`optim.muon_learning_rate` .0.1. has no effect: `optim.name` is not muon"),
        (["optim.decay_share=0.2"], "`optim.decay_share` .0.2. has no effect: `optim.schedule` is not wsd"),
        (["optim.schedule=wsd", "optim.decay_share=0"], "`optim.decay_share` must be above 0 and at most 1, got 0"),
        (["optim.name=muon", "train.shard=true"], "`optim.name` muon does not go with `train.shard`"),
        (["optim.name=muon", "train.precision=fp16"], "`optim.name` muon does not go with `train.precision` .'fp16'"),
    ],
)
def test_what_has_no_effect_or_is_not_built_is_refused(recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(recipe, overrides)


@pytest.mark.parametrize("engine", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_splits_matrices_is_refused(recipe, monkeypatch, engine):
    monkeypatch.setenv(engine, "true")

    with pytest.raises(ValueError, match=r"`optim.name` muon needs whole matrices"):
        run(recipe, "out", *MUON)

    assert not (recipe.parent / "out").exists()


def test_a_model_without_linear_layers_is_refused_before_anything_is_written(recipe):
    content = yaml.safe_load(recipe.read_text()) | {"model_class": "transformers:GPT2LMHeadModel"}
    recipe.write_text(yaml.safe_dump(content))

    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no `nn.Linear` to train but its output layer"):
        run(recipe, "out", *MUON)

    assert not (recipe.parent / "out").exists()


@pytest.mark.slow
def test_processes_that_hold_the_model_whole_train_the_same(recipe, launch):
    overrides = ["train.epochs=2", *MUON]
    whole = run(recipe, "whole", *overrides)
    process = launch("two", "train.batch_size=2", *overrides)

    assert process.wait(timeout=300) == 0, (recipe.parent / "two.log").read_text()[-3000:]
    assert_same_path(whole, recipe.parent / "two")
