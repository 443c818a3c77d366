"""One model on two processes (gloo, CPU), each kind by transformers' own DistributedConfig."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract import SUM_ORDER, draw_parameters, random_ids

import hfgpt

KINDS = ["tensor", "fsdp", "pipeline"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, and what two processes saw of it."""
    folder = tmp_path_factory.mktemp("parallel")
    shape = {"vocab_size": 320, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
    model = hfgpt.HFGPTForCausalLM(hfgpt.HFGPTConfig(**shape))
    draw_parameters(model)
    model.save_pretrained(folder)
    torch.save(random_ids(2, 20), folder / "ids.pt")
    program = Path(__file__).with_name("two_processes.py")
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", program, folder]
    path = {"PYTHONPATH": str(Path(hfgpt.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | path,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture
def seen(folder):
    return torch.load(folder / "seen.pt")


@pytest.fixture
def alone(folder):
    return hfgpt.HFGPTForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_logits_of_one(folder, seen, alone, kind):
    ids = torch.load(folder / "ids.pt")
    positions = torch.arange(20).remainder(8)[None].expand(2, -1)

    torch.testing.assert_close(seen[kind]["logits"], alone(ids).logits, **SUM_ORDER)
    torch.testing.assert_close(seen[kind]["packed"], alone(ids, position_ids=positions).logits, **SUM_ORDER)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_write_the_text_of_one(folder, seen, alone, kind):
    text = alone.generate(torch.load(folder / "ids.pt"), max_new_tokens=8, do_sample=False)

    assert torch.equal(seen[kind]["text"], text)


def test_tensor_parallelism_halves_the_matrices_of_every_block_and_the_output_layer(seen):
    shapes = seen["tensor"]["shapes"]

    for layer in range(3):
        for name, shape in {
            "self_attn.q_proj": (16, 32),
            "self_attn.k_proj": (16, 32),
            "self_attn.v_proj": (16, 32),
            "self_attn.o_proj": (32, 16),
            "mlp.up_proj": (64, 32),
            "mlp.down_proj": (32, 64),
        }.items():
            assert shapes[f"model.layers.{layer}.{name}.weight"] == shape


def test_fsdp_wraps_each_block_and_halves_every_parameter(seen, alone):
    shapes = seen["fsdp"]["shapes"]

    assert {f"model.layers.{layer}" for layer in range(3)} <= {*seen["fsdp"]["units"]}
    assert shapes.keys() == {name for name, _ in alone.named_parameters()}
    for name, shape in shapes.items():
        assert shape[0] * 2 == alone.get_parameter(name).shape[0], name


@pytest.mark.parametrize("kind", ["tensor", "fsdp"])
def test_two_processes_learn_what_one_learns(folder, seen, alone, kind):
    ids = torch.load(folder / "ids.pt")
    alone(ids, labels=ids).loss.backward()

    assert seen[kind]["gradients"].keys() == {name for name, _ in alone.named_parameters()}
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(seen[kind]["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["tensor", "fsdp"])
def test_what_two_processes_save_one_loads(folder, seen, alone, kind):
    again = hfgpt.HFGPTForCausalLM.from_pretrained(folder / kind)

    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in alone.state_dict().items())


@pytest.mark.parametrize("kind", ["tensor", "fsdp"])
def test_a_split_model_saves_its_own_code_and_not_that_of_the_engine(seen, folder, kind):
    # FSDP2 gives the model a class of torch's, which transformers takes for the code that runs it.
    config = json.loads((folder / kind / "config.json").read_text())

    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_hfgpt.HFGPTForCausalLM"
    assert config["architectures"] == ["HFGPTForCausalLM"]
    assert sorted(path.name for path in (folder / kind).glob("*.py")) == [
        *(
            "arguments.py",
            "configuration_hfgpt.py",
            "gpt.py",
            "loss.py",
            "loss_triton.py",
            "modeling_hfgpt.py",
            "positions.py",
        ),
    ]
