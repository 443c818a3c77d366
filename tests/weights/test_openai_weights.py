"""OpenAI's TensorFlow checkpoints, without TensorFlow; with it, in a virtual environment of its own, if asked for."""

import json
import os
import subprocess
import sys
import venv

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from hfgpt.weights import load, save
from hfgpt.weights.convert import convert
from hfgpt.weights.formats.openai import DATA, HPARAMS, INDEX, table_entries

OTHER_NAMES = {
    "transformer.": "model/",
    "h.": "h",
    ".ln_1.weight": "/ln_1/g",
    ".ln_1.bias": "/ln_1/b",
    ".ln_2.weight": "/ln_2/g",
    ".ln_2.bias": "/ln_2/b",
    "ln_f.weight": "ln_f/g",
    "ln_f.bias": "ln_f/b",
    "wte.weight": "wte",
    "wpe.weight": "wpe",
    ".attn.": "/attn/",
    ".mlp.": "/mlp/",
    ".weight": "/w",
    ".bias": "/b",
}

WITH_TENSORFLOW = """
import sys
import numpy as np, tensorflow as tf
ours, theirs, expected = sys.argv[1:]
expected = dict(np.load(expected))
reader = tf.train.load_checkpoint(ours + "/model.ckpt")
names = reader.get_variable_to_shape_map()
assert names.keys() == expected.keys(), names.keys() ^ expected.keys()
for name, array in expected.items():
    assert np.array_equal(reader.get_tensor(name), array), name
tf.raw_ops.SaveV2(
    prefix=theirs + "/model.ckpt", tensor_names=sorted(expected), shape_and_slices=[""] * len(expected),
    tensors=[tf.constant(expected[name]) for name in sorted(expected)],
)
"""


def as_openai(gpt2):
    """GPT-2's tensors under OpenAI's names and in its shapes, in the order of the file."""
    result = {}
    for name, tensor in gpt2.state_dict().items():
        if name == "lm_head.weight":
            continue
        for old, new in OTHER_NAMES.items():
            name = name.replace(old, new)
        result[name] = tensor[None] if name.endswith("/w") else tensor
    return {name: result[name] for name in sorted(result)}


@pytest.fixture
def gpt2(make_gpt2):
    return make_gpt2(num_hidden_layers=11)  # so that h10 comes before h2


@pytest.fixture
def folder(gpt2, tmp_path):
    """A checkpoint folder of OpenAI's kind."""
    gpt2.save_pretrained(tmp_path / "gpt2")
    convert(tmp_path / "gpt2", tmp_path / "openai", "openai")
    return tmp_path / "openai"


def test_the_files_are_openais(gpt2, folder):
    tensors = as_openai(gpt2)

    assert {file.name for file in folder.iterdir()} == {HPARAMS, INDEX, DATA, "checkpoint"}
    assert (folder / DATA).read_bytes() == b"".join(each.contiguous().numpy().tobytes() for each in tensors.values())
    assert [key.decode() for key, _ in table_entries(folder / INDEX)] == ["", *tensors]
    assert json.loads((folder / HPARAMS).read_text()) == {
        "n_vocab": 320,
        "n_ctx": 64,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 11,
    }


def test_a_checkpoint_gives_gpt2s_logits(gpt2, folder):
    ids = torch.arange(60).view(3, 20)

    model = load(folder)

    torch.testing.assert_close(model(ids).logits, gpt2(ids).logits, rtol=0, atol=1e-4)  # eleven layers deep


def test_a_flipped_bit_anywhere_is_found(folder):
    for name in (INDEX, DATA):
        content = (folder / name).read_bytes()
        for place in range(0, len(content), len(content) // 30):
            if name == INDEX and len(content) - 48 <= place < len(content) - 8:
                continue  # of the footer's forty bytes most are filling
            damaged = bytearray(content)
            damaged[place] ^= 4
            (folder / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=r"checksum|no TensorFlow index|damaged"):
                load(folder)
        (folder / name).write_bytes(content)
    load(folder)


@pytest.mark.parametrize("name", [INDEX, DATA, HPARAMS])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused_by_name(folder, name, share):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)])

    with pytest.raises(ValueError, match=name):
        load(folder)


def test_a_missing_file_and_another_shape_are_refused(folder):
    shape = json.loads((folder / HPARAMS).read_text())
    (folder / HPARAMS).write_text(json.dumps({**shape, "n_layer": 12}))
    with pytest.raises(ValueError, match=r"openai: model/h11/ln_1/g: not in the file"):
        load(folder)
    (folder / HPARAMS).write_text(json.dumps({**shape, "n_embd": 64}))
    with pytest.raises(ValueError, match=r"model/wte: expected shape \(320, 64\), got \(320, 32\)"):
        load(folder)
    (folder / HPARAMS).write_text(json.dumps({"n_ctx": 64}))
    with pytest.raises(ValueError, match=r"hparams\.json: not OpenAI's shape of a GPT-2: KeyError\('n_vocab'\)"):
        load(folder)
    (folder / DATA).unlink()
    with pytest.raises(ValueError, match=f"{DATA} is missing"):
        load(folder)


def test_half_precision_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"the format needs fp32, the model is torch\.bfloat16"):
        save(load(folder).to(torch.bfloat16), tmp_path / "half", "openai")


def test_the_tokenizer_comes_along(folder, tokenizer, tmp_path):
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "encoder.json").write_text(json.dumps(bpe["vocab"]))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in bpe["merges"]) + "\n")
    text = "The file object: 한국어 \r\n  and so on<|endoftext|>"

    convert(folder, tmp_path / "hfgpt", "hfgpt")
    convert(tmp_path / "hfgpt", tmp_path / "again", "gpt2")
    convert(tmp_path / "hfgpt", tmp_path / "openai again", "openai")
    convert(tmp_path / "openai again", tmp_path / "once more", "gpt2")

    assert json.loads((tmp_path / "openai again/encoder.json").read_text()) == bpe["vocab"]
    assert (tmp_path / "openai again/vocab.bpe").read_bytes() == (folder / "vocab.bpe").read_bytes()
    for place in ("hfgpt", "again", "once more"):
        loaded = AutoTokenizer.from_pretrained(tmp_path / place)
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.eos_token_id == tokenizer.eos_token_id
        assert isinstance(loaded.backend_tokenizer, Tokenizer)


@pytest.mark.slow
def test_tensorflow_reads_ours_and_we_read_its(gpt2, folder, tmp_path):
    import numpy as np

    home = tmp_path / "tensorflow"
    venv.create(home, with_pip=True)
    python = str(home / ("Scripts" if sys.platform == "win32" else "bin") / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "tensorflow-cpu"], check=True)
    np.savez(tmp_path / "expected.npz", **{name: each.numpy() for name, each in as_openai(gpt2).items()})
    theirs = tmp_path / "theirs"
    theirs.mkdir()

    subprocess.run(
        [python, "-c", WITH_TENSORFLOW, folder, theirs, tmp_path / "expected.npz"],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
    )

    (theirs / HPARAMS).write_text((folder / HPARAMS).read_text())
    ours, read = load(folder).state_dict(), load(theirs).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in ours.items())
