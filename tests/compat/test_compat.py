"""Folders that earlier versions saved, each as it was: today's hfgpt opens them, and so does their own code.

`write.py` wrote them, and what is expected of them. The newest is today's until the code moves on.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file

import hfgpt
from hfgpt.check import check
from hfgpt.check.report import notes, to_markdown
from hfgpt.weights.remote_code import describe_other_code, update_code

HERE = Path(__file__).parent
PACKAGE = Path(hfgpt.__file__).parent
FOLDERS = sorted(path.parent for path in HERE.glob("*/model"))


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


@pytest.fixture(scope="module", params=["the installed hfgpt", "its own code"])
def by(request):
    return request.param


@pytest.fixture(scope="module")
def answer(folder, by, tmp_path_factory):
    """What a process of its own makes of the folder: tensors, and what it says."""
    place = tmp_path_factory.mktemp("compat")
    # -I for its own code: neither the current folder nor PYTHONPATH.
    options = ["-I"] if by == "its own code" else []
    done = subprocess.run(
        [sys.executable, *options, str(HERE / "open_folder.py"), str(folder), str(place / "answer.safetensors"), by],
        env=os.environ | {"HF_MODULES_CACHE": str(place / "modules"), "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with safe_open(place / "answer.safetensors", "pt") as file:
        said = json.loads(file.metadata()["said"])
    return load_file(place / "answer.safetensors") | said


@pytest.fixture(scope="module")
def expected(folder):
    return load_file(folder / "expected.safetensors")


def test_this_version_and_no_later_one_has_a_folder():
    versions = [Version(each.name) for each in FOLDERS]

    assert max(versions) == Version(hfgpt.__version__)  # `python tests/compat/write.py`, before it is released


def test_a_folder_says_what_wrote_it(folder):
    with safe_open(folder / "expected.safetensors", "pt") as file:
        written_by = file.metadata()

    assert written_by["hfgpt"] == folder.name
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["transformers_version"] == written_by["transformers"]


def test_check_says_under_which_versions_a_folder_was_tried(folder):
    saved_by = json.loads((folder / "model" / "config.json").read_text())["transformers_version"]

    report = check(str(folder / "model"), only=["changing-a-token-leaves-earlier-logits"])

    (line,) = notes(report)
    assert f"saved by transformers {saved_by}; tried here with {transformers.__version__}; " in line
    newest = ".".join(map(str, hfgpt.NEWEST_TRIED))
    assert line.endswith(f"hfgpt {hfgpt.__version__}'s own tests were run with 5.23 and {newest}.")
    assert line in to_markdown(report)


def test_the_code_that_was_meant_runs(answer, by):
    wanted = "hfgpt.modeling_hfgpt" if by == "the installed hfgpt" else "transformers_modules."

    assert answer["module"].startswith(wanted)


def test_every_weight_is_the_files_to_the_bit(folder, answer):
    weights = load_file(folder / "model" / "model.safetensors")

    assert {f"weights.{name}" for name in weights} <= answer.keys()
    assert all(torch.equal(answer[f"weights.{name}"], tensor) for name, tensor in weights.items())


def test_the_logits_are_what_they_were(answer, expected):
    # Another torch, or CPU, sums in another order: relative to the largest, a few times fp32's 1.2e-7.
    bound = 1e-5 * expected["logits"].abs().max().item()

    torch.testing.assert_close(answer["logits"], expected["logits"], rtol=0, atol=bound)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_text_is_what_it_was(answer, expected, use_cache):
    assert torch.equal(answer[f"greedy_ids, use_cache={use_cache}"], expected["greedy_ids"])


def test_the_tokenizer_reads_and_writes_what_it_did(answer, expected):
    assert answer["ids"] == expected["input_ids"][0].tolist()
    assert answer["text"].startswith("The quick brown fox")


def test_code_that_has_moved_on_is_told_and_only_then(folder, tmp_path):
    hfgpt.HFGPTModel(hfgpt.HFGPTConfig(vocab_size=9, n_embd=8, n_head=2, n_layer=1)).save_pretrained(tmp_path / "now")
    now = {path.name: path.read_text() for path in (tmp_path / "now").glob("*.py")}
    then = {path.name: path.read_text() for path in (folder / "model").glob("*.py")}
    moved = sorted(name for name in now if then.get(name) != now[name])

    told = describe_other_code(folder / "model")

    assert (told is None) == (not moved)
    assert told is None or f"its code ({', '.join(moved)})" in told
    copy = shutil.copytree(folder / "model", tmp_path / "model")
    assert update_code(copy).replaced == moved
    assert describe_other_code(copy) is None
