"""What the tests of decoding share: a model whose text is worth comparing, and prompts of different lengths."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel


@pytest.fixture(scope="session")
def model():
    """A GPT-2 with noise on all weights, so large that its greedy text is not one token over and over."""
    sizes: dict[str, Any] = {"vocab_size": 61, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
    # Tied embeddings would favour the token just read.
    config = GPT2Config(**sizes, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture
def prompts():
    """Three prompts of seven ids."""
    return torch.randint(61, (3, 7), generator=torch.Generator().manual_seed(1))
