"""Models of every kind are loaded whole, with their tokenizer, or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import make_model
from transformers import BertConfig, BertLMHeadModel, T5Config

from hfgpt import HFGPTForCausalLM
from hfgpt.evaluation.load_model import check_causal, choose_context, choose_device, context_of, load_causal_lm
from hfgpt.weights import save


@pytest.fixture
def llama_folder(tiny_config, tokenizer, tmp_path):
    make_model("llama", tiny_config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("kind", ["hfgpt", "llama", "neox", "mamba"])
def test_a_folder_of_any_model_comes_back_as_it_was_saved(kind, tiny_config, tokenizer, tmp_path):
    model = make_model(kind, tiny_config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    loaded, its_tokenizer = load_causal_lm(str(tmp_path))

    assert type(loaded) is type(model)
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert its_tokenizer("two words")["input_ids"] == tokenizer("two words")["input_ids"]
    check_causal(loaded)  # it does not


def test_a_file_of_another_format_is_a_model_too(tiny_config, tokenizer, llama_folder, tmp_path):
    tiny_config.activation_function = "gelu"
    save(HFGPTForCausalLM(tiny_config), tmp_path / "ckpt.pt", "nanogpt")

    model, its_tokenizer = load_causal_lm(str(tmp_path / "ckpt.pt"), tokenizer=str(llama_folder))

    assert isinstance(model, HFGPTForCausalLM)
    assert len(its_tokenizer) == len(tokenizer)


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("auto", torch.float32)])
def test_weights_have_the_dtype_that_was_asked_for(llama_folder, dtype, expected):
    assert load_causal_lm(str(llama_folder), dtype=dtype)[0].dtype == expected


def test_a_missing_tensor_is_refused_and_one_left_over_is_named(llama_folder, capsys):
    file = llama_folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.extra.weight": torch.zeros(2)}, file, metadata={"format": "pt"})

    load_causal_lm(str(llama_folder))

    said = capsys.readouterr().err
    assert "1 tensors of its weights have no place in the model, such as 'model.extra.weight'" in said
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights lack 1 tensors .* such as 'model\.norm\.weight'"):
        load_causal_lm(str(llama_folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config().to_dict(), "a 't5' is no causal language model"),
        ({"model_type": "fancy"}, r"has no model type 'fancy'\.$"),
        (
            {"model_type": "fancy", "auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}},
            r"code of its own, which would be run\. Add --trust-remote-code if you trust it\.$",
        ),
        ({}, "its config.json names no `model_type`"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_in_one_line(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(ValueError, match=message) as caught:
        load_causal_lm(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_unknown_dtype_is_refused(llama_folder):
    with pytest.raises(ValueError, match=r"`--dtype` must be one of \['auto', 'fp32', 'bf16', 'fp16'\], got 'int8'"):
        load_causal_lm(str(llama_folder), dtype="int8")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_that_calls_itself_a_language_model_is_refused(dtype):
    config = BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    torch.manual_seed(0)
    model = BertLMHeadModel(config).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    with pytest.raises(ValueError, match="BertLMHeadModel lets tokens see those after them"):
        check_causal(model)

    config.is_decoder = True
    decoder = BertLMHeadModel(config).to(dtype).eval()
    decoder.load_state_dict(model.state_dict())
    check_causal(decoder)


def test_the_context_is_the_config_s_or_has_to_be_said(tiny_config):
    model, endless = make_model("neox", tiny_config), make_model("mamba", tiny_config)

    assert (context_of(model), context_of(endless)) == (64, None)
    assert (choose_context(model, None), choose_context(model, 10), choose_context(endless, 99)) == (64, 10, 99)
    with pytest.raises(ValueError, match=r"the config of a 'mamba' names no context. Set `--context`"):
        choose_context(endless, None)
    with pytest.raises(ValueError, match=r"`--context` \(65\) is longer than the model's \(64\)"):
        choose_context(model, 65)


@pytest.mark.parametrize("name", ["tpu", "cuda:99", ""])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(ValueError, match=rf"`--device` \('{name}'\) is not here"):
        choose_device(name)


def test_a_device_that_is_here_is_taken():
    assert choose_device("cpu") == torch.device("cpu")
