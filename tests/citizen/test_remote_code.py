"""The folder brings its own code: where hfgpt is not installed, the classes behave as where it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract import draw_parameters, random_ids, scores
from transformers import Trainer, TrainingArguments

import hfgpt
from hfgpt.modeling_hfgpt import AUTO_CLASSES

CODE_FILES = {
    *(
        "arguments.py",
        "configuration_hfgpt.py",
        "gpt.py",
        "loss.py",
        "loss_triton.py",
        "modeling_hfgpt.py",
        "positions.py",
    ),
}
PROGRAM = Path(__file__).with_name("without_hfgpt.py")
ROWS = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in random_ids(6, 20, seed=3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What hfgpt says of one model of each class, and what a process says of them that knows hfgpt from their files."""
    folder = tmp_path_factory.mktemp("remote")
    shape = {"vocab_size": 320, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
    config = hfgpt.HFGPTConfig(**shape, num_labels=3, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
    ids, said = random_ids(3, 20), {}
    for auto_class, model_class in AUTO_CLASSES.items():
        config.tie_word_embeddings = False
        model = model_class(config).eval()
        draw_parameters(model)
        if auto_class == "AutoModelForCausalLM":
            with torch.no_grad():  # or the greedy text is one token over and over
                model.get_input_embeddings().weight.mul_(10)
                model.get_output_embeddings().weight.mul_(10)
        model.save_pretrained(folder / auto_class)
        said[auto_class] = scores(model(ids)).detach()
        if auto_class == "AutoModelForCausalLM":
            # Without a cache, where nothing can go wrong with it: the others must write the same.
            said["text"] = model.generate(ids, max_new_tokens=24, do_sample=False, use_cache=False)
            assert len(set(said["text"][0, 20:].tolist())) > 5
    torch.save({"ids": ids, "rows": ROWS}, folder / "given.pt")
    torch.save(said, folder / "said by hfgpt.pt")

    # -I: neither the current folder nor PYTHONPATH, so that nothing but the installed packages is found. torch says the
    # other to itself, when an old DeepSpeed imports its compiler.
    warnings = ["-W", "error", "-W", "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"]
    done = subprocess.run(
        [sys.executable, "-I", *warnings, str(PROGRAM), str(folder)],
        env=os.environ | {"HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture
def by_hfgpt(folder):
    return torch.load(folder / "said by hfgpt.pt")


@pytest.fixture
def by_its_files(folder):
    return torch.load(folder / "said by its files.pt")


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_each_class_says_the_same_where_hfgpt_is_not_installed(by_hfgpt, by_its_files, auto_class):
    assert torch.equal(by_its_files[auto_class], by_hfgpt[auto_class])


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_what_was_loaded_by_its_files_saves_them_again(by_hfgpt, by_its_files, folder, auto_class):
    assert torch.equal(by_its_files[f"{auto_class}_again"], by_hfgpt[auto_class])
    files = {file.name for file in (folder / auto_class).iterdir()}
    assert {file.name for file in (folder / f"{auto_class}_again").iterdir()} == files
    assert CODE_FILES <= files


def test_the_same_text_is_written_with_and_without_a_cache(by_hfgpt, by_its_files):
    assert torch.equal(by_its_files["text"], by_hfgpt["text"])
    assert torch.equal(by_its_files["text without cache"], by_hfgpt["text"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_takes_the_same_steps(folder, by_its_files, tmp_path, smoothing):
    model = hfgpt.HFGPTForCausalLM.from_pretrained(folder / "AutoModelForCausalLM")
    arguments = TrainingArguments(**by_its_files["arguments"], label_smoothing_factor=smoothing)
    arguments.output_dir = str(tmp_path)

    Trainer(model, arguments, train_dataset=ROWS).train()

    trained = by_its_files[f"trained with {smoothing}"]
    assert trained.keys() == model.state_dict().keys()
    assert all(torch.equal(trained[name], tensor) for name, tensor in model.state_dict().items())


def test_label_smoothing_scores_the_next_token(folder, by_its_files):
    """Trainer shifts the labels only of models that it finds in transformers' own table of names."""
    model = hfgpt.HFGPTForCausalLM.from_pretrained(folder / "AutoModelForCausalLM")
    ids = torch.tensor([row["input_ids"] for row in ROWS[:2]])

    log_probabilities = model(ids).logits[:, :-1].log_softmax(dim=-1)
    hard = -log_probabilities.gather(-1, ids[:, 1:, None]).mean()
    smooth = 0.9 * hard - 0.1 * log_probabilities.mean()

    torch.testing.assert_close(by_its_files["smoothed loss"], smooth.detach(), rtol=1e-6, atol=0)


def test_a_transformers_that_is_too_old_is_refused_in_one_line(folder):
    program = f"""
import transformers
transformers.__version__ = "5.22.2"
transformers.AutoModelForCausalLM.from_pretrained({str(folder / "AutoModelForCausalLM")!r}, trust_remote_code=True)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        env=os.environ | {"HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: hfgpt's models need transformers 5.23 or newer; 5.22.2 is installed. Run `pip install --upgrade "
        "transformers`."
    )


def test_gpt2_files_are_refused_with_word_of_what_reads_them(by_its_files):
    assert "Install hfgpt" in by_its_files["refusal"]
