"""`transformers serve`, the real program, on what hfgpt exports."""

import os
import socket
import subprocess
import sys
import time

import httpx
import pytest
import torch
from transformers.utils.import_utils import is_serve_available

from hfgpt.weights import load
from hfgpt.weights.convert import convert

COMPAT = "tests/compat/0.1.0/model"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_serve_available(), reason="needs `pip install transformers[serving]`"),
]


@pytest.fixture
def serve(tmp_path):
    """A function that serves a folder on a free port of this machine, and returns its address."""
    processes = []

    def serve(folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
        arguments = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
        processes.append(subprocess.Popen([sys.executable, "-c", command, *arguments], env=env))
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                httpx.get(f"{address}/health").raise_for_status()
                return address
            except httpx.TransportError:
                assert processes[-1].poll() is None, "the server has ended"
                time.sleep(0.5)
        raise AssertionError("the server does not answer")

    yield serve
    for process in processes:
        process.terminate()
        process.wait()


def test_an_exported_gpt2_is_served_with_the_models_own_words(serve, tmp_path):
    from transformers import AutoTokenizer

    convert(COMPAT, tmp_path / "gpt2", "gpt2")
    model, tokenizer = load(COMPAT), AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    ids = tokenizer("The quick brown", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)

    request = {"model": str(tmp_path / "gpt2"), "prompt": "The quick brown", "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{serve(tmp_path / 'gpt2')}/v1/completions", json=request, timeout=120).raise_for_status()

    [choice] = answer.json()["choices"]
    assert choice["text"] == tokenizer.decode(expected[0, ids.shape[1] :])
