"""GGUF files, judged by the real llama.cpp (xllamacpp is a build of it)."""

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoTokenizer

from hfgpt import HFGPTConfig, HFGPTForCausalLM
from hfgpt.data.tokenizer import train_tokenizer
from hfgpt.weights.convert import convert

NEW_TOKENS = 12

# A process of its own: llama.cpp talks to the terminal from threads of its own.
WITH_LLAMA_CPP = """
import json, sys
import xllamacpp
file, prompt, new_tokens = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path = file
params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 64, 1, False, 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
answer = xllamacpp.Server(params).handle_completions(
    {"prompt": json.loads(prompt), "max_tokens": int(new_tokens), "temperature": 0, "logprobs": 20}
)
print("ANSWER" + json.dumps(answer["choices"][0]))
"""


@pytest.fixture(scope="module")
def tokenizer(lines):
    return train_tokenizer(lines, vocab_size=400, model_max_length=64)


@pytest.fixture
def make_folder(tokenizer, tmp_path):
    """A function that saves a random model with its tokenizer, and returns the model and the folder."""

    def make_folder(**changes):
        shape = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
        model = HFGPTForCausalLM(HFGPTConfig(**{**shape, "tie_word_embeddings": False, **changes})).eval()
        draws = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                is_gain = parameter.ndim == 1 and name.endswith("weight")
                parameter.normal_(mean=float(is_gain), std=0.1, generator=draws)
            model.model.embed_tokens.weight.mul_(10 if not model.config.tie_word_embeddings else 1)  # a lively text
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return model, tmp_path / "model"

    return make_folder


def complete(file, prompt):
    """What llama.cpp writes after a prompt: its text, and the log-probabilities of the first token."""
    done = subprocess.run(
        [sys.executable, "-c", WITH_LLAMA_CPP, str(file), json.dumps(prompt), str(NEW_TOKENS)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "ANSWER" in done.stdout, done.stderr[-2000:]
    answer = json.loads(done.stdout.partition("ANSWER")[2].splitlines()[0])
    first = answer["logprobs"]["content"][0]["top_logprobs"]
    return answer["text"], {token["id"]: token["logprob"] for token in first}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-3), ("fp16", 5e-3), ("q8_0", 5e-2)])
def test_llama_cpp_writes_what_hfgpt_writes(make_folder, tokenizer, tmp_path, tied, dtype, bound):
    model, folder = make_folder(tie_word_embeddings=tied)

    convert(folder, tmp_path / "model.gguf", "gguf", dtype=dtype)

    ids = tokenizer("The file object", return_tensors="pt")["input_ids"]
    text, log_probabilities = complete(tmp_path / "model.gguf", "The file object")
    expected = model(ids).logits[0, -1].log_softmax(dim=-1)
    assert len(log_probabilities) == 20
    for token_id, log_probability in log_probabilities.items():
        assert abs(expected[token_id] - log_probability) < bound  # llama.cpp's GELU is a table of fp16 values
    if dtype == "fp32":
        written = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        assert text == tokenizer.decode(written[0, ids.shape[1] :])
        assert tied or len(set(written[0].tolist())) > 6


def test_llama_cpp_splits_a_text_as_the_tokenizer_does(make_folder, tokenizer, tmp_path):
    _, folder = make_folder()
    convert(folder, tmp_path / "model.gguf", "gguf")
    text = "Every effort moves you: 한국어, 3.14\n  it's"

    by_text, by_ids = (complete(tmp_path / "model.gguf", prompt)[1] for prompt in (text, tokenizer(text)["input_ids"]))

    assert by_text == by_ids


def test_llama_cpp_keeps_added_tokens_whole(make_folder, tokenizer, tmp_path):
    _, folder = make_folder(vocab_size=len(tokenizer) + 2)
    added = AutoTokenizer.from_pretrained(folder)
    added.add_tokens(["<|user|>"])
    added.add_special_tokens({"pad_token": "<|pad|>"})
    added.save_pretrained(folder)
    added.save_pretrained(tmp_path / "added")
    convert(folder, tmp_path / "model.gguf", "gguf")
    text = "Hello<|user|> there"

    by_text, by_ids = (complete(tmp_path / "model.gguf", prompt)[1] for prompt in (text, added(text)["input_ids"]))

    assert len(tokenizer) in added(text)["input_ids"]
    assert by_text == by_ids
    kinds = GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.token_type"].contents()
    assert kinds[-2:] == [gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL]
    with pytest.raises(ValueError, match=r"keeps '<\|user\|>' whole, for which OpenAI's files have no place"):
        convert(
            make_folder(vocab_size=len(tokenizer) + 2, tie_word_embeddings=True)[1],
            tmp_path / "openai",
            "openai",
            tokenizer=str(tmp_path / "added"),
        )


def test_the_file_says_what_the_model_is(make_folder, tokenizer, tmp_path):
    _, folder = make_folder(vocab_size=len(tokenizer) + 3)

    result = convert(folder, tmp_path / "model.gguf", "gguf", dtype="q8_0")

    content = GGUFReader(tmp_path / "model.gguf")
    assert content.fields["gpt2.context_length"].contents() == 64
    assert content.fields["gpt2.attention.head_count"].contents() == 4
    assert content.fields["tokenizer.ggml.token_type"].contents()[-3:] == [gguf.TokenType.UNUSED] * 3
    assert content.fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    kinds = {tensor.name: tensor.tensor_type.name for tensor in content.tensors}
    assert kinds["blk.1.attn_qkv.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["position_embd.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    assert {step.name for step in result.steps_out} == {*kinds}
    rounded = {step.name for step in result.steps_out if not step.is_exact}
    assert rounded == {name for name, kind in kinds.items() if kind == "Q8_0"}
    with pytest.raises(ValueError, match=r"--strict: .* rounded to q8_0"):
        convert(folder, tmp_path / "strict.gguf", "gguf", dtype="q8_0", strict=True)


def test_fp32_weights_are_those_of_the_model(make_folder, tmp_path):
    model, folder = make_folder()

    convert(folder, tmp_path / "model.gguf", "gguf", strict=True)

    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    block = model.model.layers[1]
    joined = torch.cat(
        [each.weight for each in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)]
    )
    assert np.array_equal(tensors["blk.1.attn_qkv.weight"], joined.detach().numpy())
    assert np.array_equal(tensors["blk.1.ffn_down.bias"], block.mlp.down_proj.bias.detach().numpy())


@pytest.mark.parametrize(
    ("changes", "how", "message"),
    [
        ({"activation_function": "gelu"}, {}, "needs `activation_function` = 'gelu_new'"),
        ({"n_embd": 48}, {"dtype": "q8_0"}, "q8_0 takes rows of a multiple of 32, this has 48"),
        ({}, {"dtype": "q4_0"}, r"`--dtype` must be one of \['fp32', 'fp16', 'q8_0'\] for gguf, got 'q4_0'"),
        ({}, {"verify": True}, "`--verify` cannot read GGUF again"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(make_folder, tmp_path, changes, how, message):
    _, folder = make_folder(**changes)

    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "model.gguf", "gguf", **how)

    assert not (tmp_path / "model.gguf").exists()


def test_a_model_without_a_tokenizer_is_refused(make_folder, tmp_path):
    _, folder = make_folder()
    (folder / "tokenizer.json").unlink()

    with pytest.raises(ValueError, match="GGUF holds the tokenizer too, and there is none in"):
        convert(folder, tmp_path / "model.gguf", "gguf")


def test_numbers_of_fp64_are_rounded_and_said(make_folder, tmp_path):
    _, folder = make_folder()
    HFGPTForCausalLM.from_pretrained(folder).double().save_pretrained(folder)
    assert convert(folder, tmp_path / "exact.gguf", "gguf").lossy == []  # they all come from fp32
    model = HFGPTForCausalLM.from_pretrained(folder)
    model.model.norm.bias.data.fill_(1 / 3)
    model.save_pretrained(folder)

    [step] = convert(folder, tmp_path / "model.gguf", "gguf").lossy

    assert (step.name, step.action) == ("output_norm.bias", "copied, rounded to fp32")


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: backend["pre_tokenizer"].update(add_prefix_space=True),
        lambda backend: backend["pre_tokenizer"].update(use_regex=False),
        lambda backend: backend.update(normalizer={"type": "Lowercase"}),
        lambda backend: backend["model"].update(ignore_merges=True),
    ],
    ids=["a space before", "other words", "lowercase", "whole words first"],
)
@pytest.mark.parametrize("to", ["gguf", "openai"])
def test_a_tokenizer_that_does_more_than_gpt2s_is_refused(make_folder, tmp_path, change, to):
    _, folder = make_folder(tie_word_embeddings=True)
    backend = json.loads((folder / "tokenizer.json").read_text())
    change(backend)
    (folder / "tokenizer.json").write_text(json.dumps(backend))

    with pytest.raises(ValueError, match="needs a byte-level BPE as GPT-2's"):
        convert(folder, tmp_path / "out", to)
