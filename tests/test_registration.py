"""How transformers comes to know hfgpt by `import hfgpt`; by code beside the weights, see citizen/test_remote_code.py.

What is imported first must not matter, so each case is a Python process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, GPT2Model

import hfgpt

FIRST_IMPORTS = [
    "import hfgpt; from transformers import AutoConfig",
    "import hfgpt; from transformers import AutoModel",
    "import hfgpt; from transformers import GPT2LMHeadModel",
    "import hfgpt; from transformers import GenerationMixin",
    "import hfgpt; from transformers import pipeline; pipeline('text-generation', FOLDER)('The', max_new_tokens=3)",
    "from transformers import AutoModelForCausalLM; import hfgpt",
    "from transformers import AutoConfig; import hfgpt",
    "from hfgpt.modeling_hfgpt import HFGPTForCausalLM",
    "import hfgpt, peft",
    "import peft, hfgpt",
]

AUTO_CLASSES_KNOW_HFGPT = """
from transformers import AutoConfig
config = AutoConfig.from_pretrained(FOLDER)
assert type(config).__module__ == "hfgpt.configuration_hfgpt", type(config)

from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
assert type(AutoModel.from_config(config)).__module__ == "hfgpt.modeling_hfgpt"
model = AutoModelForCausalLM.from_pretrained(FOLDER)
import hfgpt
assert type(model) is hfgpt.HFGPTForCausalLM
assert type(AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_head=2, n_layer=1))) is GPT2LMHeadModel
import sys
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "hfgpt"]
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
assert TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["hfgpt"] == ["q_proj", "v_proj"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A saved model with its tokenizer."""
    folder = tmp_path_factory.mktemp("registration")
    config = hfgpt.HFGPTConfig(vocab_size=320, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    hfgpt.HFGPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(program):
    path = {"PYTHONPATH": str(Path(hfgpt.__file__).parents[1])}
    arguments = [sys.executable, "-W", "error", "-c", program]
    return subprocess.run(arguments, env=os.environ | path, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("first", FIRST_IMPORTS, ids=lambda first: first[:60])
def test_auto_classes_know_hfgpt_whatever_comes_first(folder, first):
    done = run(f"FOLDER = {str(folder)!r}\n{first}\n{AUTO_CLASSES_KNOW_HFGPT}")

    assert done.returncode == 0, done.stderr


def test_import_hfgpt_imports_neither_torch_nor_transformers():
    done = run("import sys; before = {*sys.modules}; import hfgpt; print(*sorted({*sys.modules} - before))")

    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "hfgpt" in loaded
    assert not loaded - {"hfgpt"} - sys.stdlib_module_names


def with_version(version, rank="0"):
    """What hfgpt writes when it meets a transformers of that version."""
    program = f"import os, transformers\ntransformers.__version__ = {version!r}\nos.environ['RANK'] = {rank!r}\n"
    done = run(program + "import hfgpt\nfrom transformers import AutoModel, AutoModelForCausalLM\nhfgpt.HFGPTModel")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # where a program that asked for --json reads
    return done.stderr


def test_a_transformers_that_was_never_tried_is_named_once_with_what_to_do():
    major, minor = hfgpt.NEWEST_TRIED

    [line] = with_version(f"{major}.{minor + 1}.0.dev0").splitlines()

    assert line == (
        f"transformers {major}.{minor + 1}.0.dev0 is newer than any that hfgpt {hfgpt.__version__} was tried with, up "
        f"to {major}.{minor}. `hfgpt verify --random small` says whether the model is still right. If not: "
        f'`{sys.executable} -m pip install "transformers<{major}.{minor + 1}"`, or a newer hfgpt.'
    )
    assert with_version(f"{major}.{minor + 1}.0", rank="1") == ""  # the first process has said it


def test_a_later_patch_of_a_tried_transformers_is_no_news():
    major, minor = hfgpt.NEWEST_TRIED

    assert with_version(f"{major}.{minor}.9") == ""


def test_public_names_are_those_listed():
    assert {*hfgpt.__all__} <= {*dir(hfgpt)}
    assert all(getattr(hfgpt, name) is not None for name in hfgpt.__all__)
    with pytest.raises(AttributeError, match="module 'hfgpt' has no attribute 'HFGPTForCasualLM'"):
        hfgpt.HFGPTForCasualLM  # noqa: B018


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ("MODEL", "HFGPTModel"),
        ("MODEL_FOR_CAUSAL_LM", "HFGPTForCausalLM"),
        ("MODEL_FOR_SEQUENCE_CLASSIFICATION", "HFGPTForSequenceClassification"),
        ("MODEL_FOR_TOKEN_CLASSIFICATION", "HFGPTForTokenClassification"),
        ("MODEL_FOR_QUESTION_ANSWERING", "HFGPTForQuestionAnswering"),
    ],
)
def test_tables_that_know_models_by_name_know_hfgpt(table, name):
    from transformers.models.auto import modeling_auto

    assert getattr(modeling_auto, f"{table}_MAPPING_NAMES")["hfgpt"] == getattr(hfgpt, name).__name__


def test_transformers_own_gpt2_is_as_it_was(random_gpt2, tmp_path):
    ids = torch.arange(60).view(3, 20)
    random_gpt2.save_pretrained(tmp_path)

    for again in (GPT2LMHeadModel.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(again) is GPT2LMHeadModel
        assert torch.equal(again(ids).logits, random_gpt2(ids).logits)
    base = GPT2Model.from_pretrained(tmp_path)
    for name, tensor in random_gpt2.transformer.state_dict().items():
        assert torch.equal(base.state_dict()[name], tensor), name
