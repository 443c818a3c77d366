"""Small models of several architectures, tokenizers that add tokens, tasks of lm-eval: for the tests that need them."""

import json

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from hfgpt import HFGPTForCausalLM

SHAPE = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def make_model(kind, tiny_config):
    """A small model whose every parameter is drawn, far from uniform, so that a wrong target costs."""
    torch.manual_seed(0)
    model = {
        "hfgpt": lambda: HFGPTForCausalLM(tiny_config),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=48, max_position_embeddings=64)),
        "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, intermediate_size=48, max_position_embeddings=64)),
        # Without attention and without a longest sequence.
        "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=16, num_hidden_layers=1)),
    }[kind]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def adding(tokenizer, template):
    """The same tokenizer, but it puts special tokens around each text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    end = tokenizer.eos_token
    backend.post_processor = TemplateProcessing(single=template, special_tokens=[(end, tokenizer.eos_token_id)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end)


def write_task(folder, name, rows, **settings):
    """A task of one's own: a YAML file (JSON is YAML) and its .jsonl."""
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"task": name, "test_split": "test", **data, **settings}), encoding="utf-8")
    return str(path)
