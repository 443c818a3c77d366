"""Models of every class for the contract, beside transformers' own GPT-2 with the same weights."""

import pytest
import torch
import transformers
from contract import GPT2_CLASSES, draw_parameters

import hfgpt


@pytest.fixture
def make(tiny):
    """A function that makes a small model of any class in eval mode, with changes to its config."""

    def make(model_class, attn_implementation="sdpa", **changes):
        config = hfgpt.HFGPTConfig(**{**tiny, "num_labels": 3, **changes})
        model = model_class._from_config(config, attn_implementation=attn_implementation).eval()
        draw_parameters(model)
        return model

    return make


@pytest.fixture
def make_pair(tiny, tmp_path):
    """A function that makes a GPT-2 of transformers, and the hfgpt model that `from_pretrained` makes of its folder."""

    def make_pair(model_class, attn_implementation="sdpa", **changes):
        gpt2_class = getattr(transformers, GPT2_CLASSES[model_class])
        ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
        config = transformers.GPT2Config(**{**tiny, **ids, "num_labels": 3, **changes})
        gpt2 = gpt2_class._from_config(config, attn_implementation=attn_implementation).eval()
        draw_parameters(gpt2)
        gpt2.save_pretrained(tmp_path / "gpt2")
        model = model_class.from_pretrained(tmp_path / "gpt2", attn_implementation=attn_implementation)
        return gpt2, model

    return make_pair


@pytest.fixture
def uncompiled():
    """Let torch.compile leave everything as it is: transformers compiles flex_attention, which takes a C++ compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield
