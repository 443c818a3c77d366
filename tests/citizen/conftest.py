"""Models of every class for the contract, beside transformers' own GPT-2 or NanoChat with the same weights."""

import pytest
import torch
import transformers
from contract import NANOCHAT_CLASSES, REFERENCE_CLASSES, draw_parameters

import hfgpt


def nanochat_config(tiny, **changes):
    """`tiny` as a nanochat: two heads of queries for each of keys and values."""
    fields = {
        name: value
        for name, value in {**tiny, **changes}.items()
        if name in transformers.NanoChatConfig.__annotations__
    }
    own = {"intermediate_size": 96, "num_key_value_heads": 2, "attention_dropout": tiny["attn_pdrop"]}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return transformers.NanoChatConfig(**{**own, **ids, **fields})


@pytest.fixture
def make(tiny):
    """A function that makes a small model of any class in eval mode, with changes to its config."""

    def make(model_class, attn_implementation="sdpa", **changes):
        if model_class in NANOCHAT_CLASSES:
            config = nanochat_config(tiny, **changes)
        else:
            config = hfgpt.HFGPTConfig(**{**tiny, "num_labels": 3, **changes})
        model = model_class._from_config(config, attn_implementation=attn_implementation).eval()
        draw_parameters(model)
        return model

    return make


@pytest.fixture
def make_pair(tiny, tmp_path):
    """A function that makes a model of transformers, and the hfgpt model that `from_pretrained` makes of its folder."""

    def make_pair(model_class, attn_implementation="sdpa", **changes):
        reference_class = getattr(transformers, REFERENCE_CLASSES[model_class])
        ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
        if model_class in NANOCHAT_CLASSES:
            config = nanochat_config(tiny, pad_token_id=0, **changes)
        else:
            config = transformers.GPT2Config(**{**tiny, **ids, "num_labels": 3, **changes})
        reference = reference_class._from_config(config, attn_implementation=attn_implementation).eval()
        draw_parameters(reference)
        reference.save_pretrained(tmp_path / "reference")
        model = model_class.from_pretrained(tmp_path / "reference", attn_implementation=attn_implementation)
        return reference, model

    return make_pair


@pytest.fixture
def uncompiled():
    """Let torch.compile leave everything as it is: transformers compiles flex_attention, which takes a C++ compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield
