"""KerasHub, the lecture's other way to fine-tune, in a virtual environment of its own."""

import json
import os
import subprocess
import sys
import venv

import pytest
import torch

from hfgpt.weights.convert import convert

WITH_KERAS_HUB = """
import json, sys
import keras_hub, numpy as np
folder, text, new_tokens = sys.argv[1:]
task = keras_hub.models.GPT2CausalLM.from_preset(folder)
ids = np.array([task.preprocessor.tokenizer(text)])
logits = task({"token_ids": ids, "padding_mask": np.ones_like(ids)}).detach().numpy()
task.compile(sampler="greedy")
written = task.generate(text, max_length=ids.shape[1] + 1 + int(new_tokens), stop_token_ids=None)
print("RESULT" + json.dumps({"ids": ids[0].tolist(), "logits": logits[0].tolist(), "text": written}))
"""


@pytest.mark.slow
def test_keras_hubs_whole_task_loads_our_gpt2_folder_and_writes_the_same(make_gpt2, tokenizer, tmp_path):
    gpt2 = make_gpt2()
    gpt2.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    convert(tmp_path / "gpt2", tmp_path / "hfgpt", "hfgpt")
    convert(tmp_path / "hfgpt", tmp_path / "again", "gpt2")
    text = "The file object, 한국어"
    home = tmp_path / "keras"
    venv.create(home, with_pip=True)
    python = str(home / ("Scripts" if sys.platform == "win32" else "bin") / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "keras-hub", "torch==2.13.0", "safetensors"], check=True)

    done = subprocess.run(
        [python, "-c", WITH_KERAS_HUB, tmp_path / "again", text, "12"],
        env=os.environ | {"KERAS_BACKEND": "torch", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )

    found = json.loads(done.stdout.rpartition("RESULT")[2])
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert found["ids"] == ids[0].tolist()
    torch.testing.assert_close(torch.tensor([found["logits"]]), gpt2(ids).logits.detach(), rtol=0, atol=1e-4)
    # KerasHub's preprocessor begins a text with the token that ends one.
    begun = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], dim=1)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = gpt2.generate(begun, attention_mask=torch.ones_like(begun), **settings)
    assert tokenizer.decode(expected[0, 1:]) == found["text"]
