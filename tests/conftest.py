"""The tiny world: all that a test needs, real but small, made in memory and without the network."""

import os

# Before transformers and datasets are imported; `HF_HUB_OFFLINE=0 pytest -m hub` overrides the first.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars obey it too
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import pytest
import torch

torch.set_num_threads(1)

END_OF_TEXT = "<|endoftext|>"


@pytest.fixture
def tiny():
    """Fields of a small `HFGPTConfig`: every size another number, dropout on."""
    return {
        "vocab_size": 320,
        "max_position_embeddings": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
    }


@pytest.fixture
def tiny_config(tiny):
    from hfgpt import HFGPTConfig

    return HFGPTConfig(**tiny)


@pytest.fixture(scope="session")
def lines():
    """200 lines of real English: the beginning of the manual that comes with every Python."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return [line for line in text.splitlines() if line.strip()][:200]


@pytest.fixture(scope="session")
def tokenizer(lines):
    """A byte-level BPE of 320 tokens, as many as `tiny` has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


@pytest.fixture
def make_gpt2(tiny):
    """A function that makes transformers' GPT-2 of `tiny`'s shape, with changes to its config.

    Every parameter is drawn, biases and gains too: with their zeros and ones, swapped norms or biases would go unseen.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    def make(**changes):
        config = GPT2Config(**{**tiny, "bos_token_id": None, "eos_token_id": None, **changes})
        gpt2 = GPT2LMHeadModel(config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in gpt2.named_parameters():
                is_gain = name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))
                parameter.normal_(mean=float(is_gain), std=0.1, generator=generator)
        return gpt2

    return make


@pytest.fixture
def random_gpt2(make_gpt2):
    return make_gpt2()


@pytest.fixture
def make_twins(make_gpt2, tmp_path):
    """A function that makes transformers' GPT-2 and the hfgpt model that `from_pretrained` makes of its folder."""
    from hfgpt import HFGPTForCausalLM

    def make(attn_implementation="sdpa", **changes):
        gpt2 = make_gpt2(**changes)
        gpt2.set_attn_implementation(attn_implementation)
        gpt2.save_pretrained(tmp_path / "gpt2")
        model = HFGPTForCausalLM.from_pretrained(tmp_path / "gpt2", attn_implementation=attn_implementation)
        return gpt2, model

    return make
