"""Every command and every snippet of the README runs, in its order, in one folder; only made small.

What is changed before it runs stands in `SMALLER`, so that nothing else is.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hub_server import TestHub

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)

TINY_RUN = (
    "model.n_embd=32 model.n_layer=1 model.n_head=2 tokenizer.vocab_size=400 train.max_steps=2 optim.warmup_steps=1 "
    "train.batch_size=2 train.eval_rows=2 sample.max_new_tokens=3"
)
SMALLER = [
    (r"hfgpt train demo output_dir=out/two.*", r"\g<0> train.save_every=0 " + TINY_RUN),
    (r"hfgpt train demo (?!output_dir=out/two).*", r"\g<0> data.source=null data.files=my.txt " + TINY_RUN),
    (r"hfgpt train finetune.*", r"\g<0> data.block_size=32 optim.warmup_steps=1 sample.max_new_tokens=3"),
    (r"--random small", r"--random small --layers 1"),
    (r"openai-community/gpt2", r"tiny-gpt2"),  # the Hub cannot be reached: a random GPT-2 of transformers stands in
]


def smaller(command):
    command = command.partition("#")[0].strip()
    for pattern, replacement in SMALLER:
        command = re.sub(pattern, replacement, command)
    return command


def commands(block):
    return [command for line in block.splitlines() if (command := smaller(line))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lines, tokenizer):
    """A folder with what the README's reader has: a text, and in place of the Hub a small GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from hfgpt import HFGPTConfig, HFGPTForCausalLM
    from hfgpt.weights import save

    folder = tmp_path_factory.mktemp("readme")
    (folder / "my.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "LICENSE").symlink_to(ROOT / "LICENSE")
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "tiny-gpt2")
    tokenizer.save_pretrained(folder / "tiny-gpt2")
    shape = {"vocab_size": 320, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    save(HFGPTForCausalLM(HFGPTConfig(**shape, activation_function="gelu")), folder / "ckpt.pt", "nanogpt")
    return folder


def test_every_command_and_snippet_in_the_readme_runs(folder):
    with TestHub({"hf_token": ["user"]}) as hub:
        run_all(folder, hub)


def run_all(folder, hub):
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_token",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    ran = 0
    for language, block in BLOCKS:
        if language == "python":
            steps = [[sys.executable, "-c", re.sub("openai-community/gpt2", "tiny-gpt2", block)]]
        else:
            steps = [
                ["bash", "-c", command] for command in commands(block) if not command.startswith(("make", "source"))
            ]
        for step in steps:
            done = subprocess.run(step, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, f"{step[-1]}\n{done.stderr[-3000:]}"
            ran += 1
    assert ran >= 10
    assert (folder / "out" / "gpt2" / "model.safetensors").is_file()
    assert hub.repos["user/demo"].private
    assert (folder / "out" / "copy" / "model.safetensors").is_file()


def test_make_demo_does_what_the_readme_does_by_hand():
    planned = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert ".venv/bin/hfgpt train demo" in planned
    assert ".venv/bin/hfgpt generate out/demo" in planned


def test_make_demo_installs_what_a_run_needs_and_make_test_adds_the_rest_to_it():
    installs = {
        target: re.findall(
            r"pip install .*--editable (\S+)",
            subprocess.run(["make", "-nB", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout,
        )
        for target in ("venv", "demo", "test", "faults", "upstream")
    }

    assert installs["venv"] == installs["demo"] == ["."]
    assert installs["test"] == installs["faults"] == installs["upstream"] == [".", '".[test]"']


def test_every_target_of_make_that_the_readme_names_exists():
    for target in re.findall(r"`?make ([a-z-]+)", README):
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)


def test_the_map_names_every_file_of_the_library():
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", README.partition("## The map")[2].partition("## Verified")[0]))
    there = {path.name for path in (ROOT / "hfgpt").glob("*.py")} - {"__init__.py", "__main__.py"}
    in_weights = {path.name for path in (ROOT / "hfgpt/weights").glob("*.py")}

    assert there | {"weights/", "cli/"} <= named
    assert named <= there | in_weights | {"weights/", "cli/", "hfgpt/"}


def test_the_table_of_extras_names_all_that_a_user_may_want_and_what_they_bring():
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    brought = {
        extra: [re.match(r"[\w-]+", package)[0] for package in packages]
        for extra, packages in asked.items()
        if extra != "test"
    }

    shown = {}
    for extras, packages in re.findall(
        r"^\| ((?:`\w+`(?:, )?)+) \| ([\w,;\- ]+) \| .* \|$", README, flags=re.MULTILINE
    ):
        names = re.findall(r"`(\w+)`", extras)
        shown |= {name: part.split(", ") for name, part in zip(names, packages.split("; "), strict=True)}

    assert shown == brought


def test_the_table_of_formats_names_all_that_can_be_written():
    from hfgpt.weights import WRITERS

    rows = re.findall(r"^\| `([\w.-]+)`: .*\| ✔ \| ✔ \| bit for bit \|$", README, flags=re.MULTILINE)

    assert {*rows} == {*WRITERS}  # test_round_trips.py takes each there and back


def test_the_readme_measures_what_lm_eval_measures():
    tables = README.partition("## Measure a model")[2].partition("```text\n")[2].partition("```")[0]

    ours = dict(re.findall(r"^(\w+(?: \w+)+) +([\d,.]+) +[\d,.]+$", tables, flags=re.MULTILINE))
    theirs = dict(re.findall(r"^license +(\w+) +([\d,.]+) ", tables, flags=re.MULTILINE))

    assert set(theirs) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    for name, value in theirs.items():
        mine = ours[name.replace("_", " ")]
        assert float(mine.replace(",", "")) == pytest.approx(float(value.replace(",", "")), rel=1e-6)


def test_numbers_in_the_readme_are_those_that_were_measured():
    measured = json.loads((ROOT / "cards" / "demo.json").read_text(encoding="utf-8"))

    row = next(line for line in README.splitlines() if line.startswith("| [demo]"))

    assert f"{measured['val_perplexity']:.1f}" in row
    assert f"{measured['bigram_perplexity']:.1f}" in row
    assert measured["val_perplexity"] <= 0.85 * measured["bigram_perplexity"]


def test_the_korean_section_shows_commands_that_run_above():
    korean = README.partition("## 한국어")[2].partition("\n## ")[0]
    shown = re.findall(r"\| `([^`]+)` \|$", korean, flags=re.MULTILINE)
    run = {
        line.partition("  #")[0].strip()
        for language, block in BLOCKS
        if language == "bash"
        for line in block.splitlines()
    }

    assert len(shown) == 7
    assert set(shown) <= run
