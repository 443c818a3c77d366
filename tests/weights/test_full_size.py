"""GPT-2 small at its real size through every format, and the memory that a conversion takes."""

import filecmp
import json
import subprocess
import sys

import pytest
from transformers import GPT2Config

from hfgpt.evaluation.verify_gpt2 import SIZES, random_gpt2
from hfgpt.weights.convert import convert


@pytest.mark.slow
def test_gpt2_small_goes_through_every_format_and_comes_back_bit_for_bit(tmp_path):
    random_gpt2(GPT2Config(**SIZES["small"]), seed=0).save_pretrained(tmp_path / "gpt2")

    for source, to, dest in (
        ("gpt2", "hfgpt", "hfgpt"),
        ("hfgpt", "llm.c", "model.bin"),
        ("model.bin", "llms-from-scratch", "model.pth"),
        ("model.pth", "openai", "openai"),
        ("openai", "gpt2", "again"),
    ):
        convert(tmp_path / source, tmp_path / dest, to)
    assert filecmp.cmp(tmp_path / "gpt2/model.safetensors", tmp_path / "again/model.safetensors", shallow=False)

    config = json.loads((tmp_path / "again/config.json").read_text())
    (tmp_path / "again/config.json").write_text(json.dumps(config | {"activation_function": "gelu"}))
    convert(tmp_path / "again", tmp_path / "ckpt.pt", "nanogpt")
    convert(tmp_path / "ckpt.pt", tmp_path / "once more", "gpt2", verify=True)
    assert filecmp.cmp(tmp_path / "gpt2/model.safetensors", tmp_path / "once more/model.safetensors", shallow=False)


PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_memory(*words):
    """Bytes that `hfgpt convert` has at its peak, libraries included."""
    command = [sys.executable, "-m", "hfgpt", "convert", *map(str, words)]
    result = subprocess.run([sys.executable, "-c", PEAK, *command], capture_output=True, text=True, check=True)
    return int(result.stdout) * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory, tokenizer):
    """Folders of a tiny and a large model with a tokenizer, and the size of the large one in bytes."""
    folder = tmp_path_factory.mktemp("sizes")
    shapes = {
        "tiny": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 320},
        # As in xl, no tensor is a large part of the whole.
        "large": {"n_embd": 1024, "n_layer": 16, "n_head": 16, "vocab_size": 5000},
    }
    for name, shape in shapes.items():
        gpt2 = random_gpt2(GPT2Config(**shape, bos_token_id=None, eos_token_id=None), seed=0)
        gpt2.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "tiny", folder / "large", 4 * gpt2.num_parameters()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="counts by getrusage")
@pytest.mark.parametrize("to", ["hfgpt", "gpt2", "llm.c", "llms-from-scratch", "openai", "gguf"])
def test_a_conversion_takes_at_most_a_third_more_memory_than_the_model(two_sizes, tmp_path, to):
    tiny, large, size = two_sizes

    libraries = peak_memory(tiny, tmp_path / "tiny out", "--to", to)
    whole = peak_memory(large, tmp_path / "large out", "--to", to)

    assert whole - libraries <= 1.3 * size
