"""KerasHub, the lecture's other way to fine-tune, in a virtual environment of its own."""

import os
import subprocess
import sys
import venv

import numpy as np
import pytest
import torch

from hfgpt.weights.convert import convert

WITH_KERAS_HUB = """
import sys
import keras_hub, numpy as np
folder, ids, out = sys.argv[1:]
ids = np.load(ids)
backbone = keras_hub.models.GPT2Backbone.from_preset(folder)
hidden = backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)})
logits = backbone.token_embedding(hidden, reverse=True)
np.save(out, logits.detach().numpy())
"""


@pytest.mark.slow
def test_keras_hub_loads_our_gpt2_folder_and_gives_the_same_logits(make_gpt2, tmp_path):
    gpt2 = make_gpt2()
    gpt2.save_pretrained(tmp_path / "gpt2")
    convert(tmp_path / "gpt2", tmp_path / "hfgpt", "hfgpt")
    convert(tmp_path / "hfgpt", tmp_path / "again", "gpt2")
    ids = torch.randint(320, (3, 20), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "ids.npy", ids.numpy())
    home = tmp_path / "keras"
    venv.create(home, with_pip=True)
    python = str(home / ("Scripts" if sys.platform == "win32" else "bin") / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "keras-hub", "torch==2.13.0", "safetensors"], check=True)

    subprocess.run(
        [python, "-c", WITH_KERAS_HUB, tmp_path / "again", tmp_path / "ids.npy", tmp_path / "logits.npy"],
        env=os.environ | {"KERAS_BACKEND": "torch", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
    )

    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    torch.testing.assert_close(found, gpt2(ids).logits.detach(), rtol=0, atol=1e-4)
