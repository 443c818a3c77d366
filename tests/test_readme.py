"""Every command and every snippet of the manual runs: README.md, the READMEs of the rooms and of recipes/, and docs/.

Each page has a folder of its own with what its reader has: a text, and the model that the first command of README.md
has trained. What is changed before it runs stands in `SMALLER`, so that nothing else is.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hub_server import TestHub

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path.parent for path in (ROOT / "hfgpt").glob("*/__init__.py"))
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        *(ROOT / "README.md", ROOT / "README.ko.md", ROOT / "recipes" / "README.md"),
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "hfgpt").rglob("README.md")),
    ]
}
README, KOREAN, INSTALL = PAGES["README.md"], PAGES["README.ko.md"], PAGES["docs/install.md"]
WEIGHTS, EVALUATION = PAGES["hfgpt/weights/README.md"], PAGES["hfgpt/evaluation/README.md"]
LONGEST_PAGE, LONGEST_LINE = 150, 200
"""Lines, and characters of a line that is no row of a table."""

TINY_RUN = (
    "model.n_embd=32 model.n_layer=1 model.n_head=2 tokenizer.vocab_size=400 train.max_steps=2 optim.warmup_steps=1 "
    "train.batch_size=2 train.eval_rows=2 sample.max_new_tokens=3"
)


def tiny_items():
    """The same among the overrides in Python."""
    typed = dict(word.split("=") for word in TINY_RUN.split())
    return (
        ", ".join(f"{key!r}: {value}" for key, value in typed.items()) + ", 'data.source': None, 'data.files': 'my.txt'"
    )


SMALLER = [
    (r"hfgpt train demo output_dir=out/two.*", r"\g<0> train.save_every=0 " + TINY_RUN),
    (r"hfgpt train demo (?!output_dir=out/two).*", r"\g<0> data.files=my.txt " + TINY_RUN),
    (r"hfgpt train finetune.*", r"\g<0> data.block_size=32 optim.warmup_steps=1 sample.max_new_tokens=3"),
    (r"^hfgpt bench train$", r"\g<0> --size tiny --rounds 2 --steps 1"),
    (r"--values 16,32", r"--values 16"),
    (r"--random small", r"--random small --layers 1"),
    (r"openai-community/gpt2", r"tiny-gpt2"),  # the Hub cannot be reached: a random GPT-2 of transformers stands in
]


def blocks(page):
    return re.findall(r"^```(bash|python)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def lines_of_bash(page):
    """The commands of a page, as they stand there."""
    code = "\n".join(block for language, block in blocks(page) if language == "bash")
    return [command for line in code.splitlines() if (command := line.partition("#")[0].strip())]


def smaller(command):
    for pattern, replacement in SMALLER:
        command = re.sub(pattern, replacement, command)
    return command


def steps(page):
    """What to run for a page, in its order."""
    for language, block in blocks(page):
        if language == "python":
            code = block.replace("openai-community/gpt2", "tiny-gpt2").replace('"train.max_steps": 200', tiny_items())
            yield [sys.executable, "-c", code]
        else:
            for line in lines_of_bash(f"```bash\n{block}```"):
                if not line.startswith(("make", "source")):
                    yield ["bash", "-c", smaller(line)]


def run(step, folder, hub_url=""):
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub_url,
        "HF_HOME": str(folder / "hf home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_token",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(step, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{step[-1]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def world(tmp_path_factory, lines, tokenizer):
    """A folder with a text, the demo as the first command of the README trains it, and a small GPT-2 for the Hub's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from hfgpt import HFGPTConfig, HFGPTForCausalLM
    from hfgpt.weights import save

    folder = tmp_path_factory.mktemp("readme")
    (folder / "my.txt").write_text("\n".join(lines), encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder)
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "tiny-gpt2")
    tokenizer.save_pretrained(folder / "tiny-gpt2")
    shape = {"vocab_size": 320, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    save(HFGPTForCausalLM(HFGPTConfig(**shape, activation_function="gelu")), folder / "ckpt.pt", "nanogpt")
    with TestHub({}) as hub:
        run(next(steps(README)), folder, hub.url)
    assert (folder / "out" / "demo" / "model.safetensors").is_file()
    return folder


@pytest.fixture
def folder(world, tmp_path):
    return Path(shutil.copytree(world, tmp_path / "here"))


MINUTES = {"hfgpt/studio/README.md"}
"""Pages whose commands are benchmarks."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in MINUTES else ())
        for name, page in PAGES.items()
        if [*steps(page)]
    ],
)
def test_every_command_and_snippet_of_the_manual_runs(folder, name):
    with TestHub({"hf_token": ["user"]}) as hub:
        for step in steps(PAGES[name]):
            run(step, folder, hub.url)

    if name == "hfgpt/weights/README.md":
        assert (folder / "out" / "gpt2" / "model.safetensors").is_file()
    if name == "hfgpt/hub/README.md":
        assert hub.repos["user/demo"].private
        assert (folder / "out" / "copy" / "model.safetensors").is_file()


def test_the_manual_names_every_command():
    from hfgpt.cli.app import ORDER_OF_THE_JOB

    shown = {line.split()[1] for page in PAGES.values() for line in lines_of_bash(page) if line.startswith("hfgpt ")}
    told = {name for page in PAGES.values() for name in re.findall(r"`hfgpt ([a-z-]+)", page)}

    assert sum(len([*steps(page)]) for page in PAGES.values()) >= 30
    assert {*ORDER_OF_THE_JOB} <= shown | told


@pytest.mark.parametrize(
    "name", [*PAGES, *(f"recipes/lecture/README{end}.md" for end in ("", ".ko")), "cards/measurements.md"]
)
def test_every_relative_link_leads_to_a_file_and_a_heading_that_exist(name):
    here = (ROOT / name).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, heading = target.partition("#")
        path = (here / file).resolve() if file else ROOT / name
        assert path.exists(), target
        assert path.is_relative_to(ROOT), target
        if heading:
            assert heading in headings(path.read_text(encoding="utf-8")), target


def headings(page):
    """As GitHub turns them into anchors."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_of_the_manual_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(([^)#\s]+)", README))

    assert {name for name in PAGES if name != "README.md"} <= linked


def test_each_entry_of_the_changelog_is_one_short_line():
    for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines():
        assert len(line) <= 120, line
        assert line == line.lstrip(), line


@pytest.mark.parametrize("name", PAGES)
def test_no_page_is_too_long(name):
    lines = PAGES[name].splitlines()

    assert len(lines) <= LONGEST_PAGE
    if name != "README.ko.md":
        assert [line for line in lines if len(line) > LONGEST_LINE and not line.startswith("|")] == []


def test_the_readme_is_short():
    assert len(README.split()) <= 1300


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
    for target in {name for page in PAGES.values() for name in re.findall(r"`make ([a-z-]+)", page)} | {"demo"}:
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)


def files_of_the_map():
    """The paths below `hfgpt/` that the map shows, and the line of the map of each."""
    tree = README.partition("## The map")[2].partition("```text\n")[2].partition("```")[0]
    paths, room = {}, ""
    for line in tree.splitlines()[1:]:
        first = re.match(r"  (\w+(?:/|\.py)) ", line)
        if first:
            room = first[1] if first[1].endswith("/") else ""
            paths[first[1]] = line
        for file in re.findall(r"[\w/]+\.py", line):
            paths[room + file] = line
    return paths


def test_the_map_shows_every_room_and_file_at_the_top_and_none_that_does_not_exist():
    there = {path.name for path in (ROOT / "hfgpt").glob("*.py")} - {"__init__.py", "__main__.py"}
    rooms = {f"{room.name}/" for room in ROOMS}

    shown = files_of_the_map()

    assert {name for name in shown if name.count("/") == 0 or name.endswith("/")} == there | rooms
    for name in shown:
        assert (ROOT / "hfgpt" / name).exists(), name


@pytest.mark.parametrize(
    ("words", "file"),
    [
        ("loss is averaged", "training/loop.py"),
        ("temperature", "generation/logits.py"),
        ("becomes final", "training/checkpoint.py"),
        ("GPT-2's names", "weights/formats/gpt2.py"),
        (".csv", "data/readers.py"),
        ("leaves behind", "hub/allowlist.py"),
    ],
)
def test_the_map_leads_to_what_a_newcomer_looks_for(words, file):
    assert words in files_of_the_map()[file]


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if name.startswith("hfgpt/")])
def test_the_page_of_a_room_names_every_file_of_it_and_none_that_does_not_exist(name):
    page, room = PAGES[name], (ROOT / name).parent
    there = {path.relative_to(room).as_posix() for path in room.rglob("*.py") if path.name != "__init__.py"}
    there |= {path.rpartition("/")[2] for path in there}

    named = set(re.findall(r"`([\w/]+\.py)`", page))

    assert {path.name for path in room.rglob("*.py") if path.name != "__init__.py"} <= {
        name.rpartition("/")[2] for name in named
    }
    for file in named - there:
        assert (ROOT / file).exists() or (ROOT / "hfgpt" / file).exists(), file


def test_every_room_has_a_page():
    assert {f"hfgpt/{room.name}/README.md" for room in ROOMS} <= {*PAGES}


def test_files_that_the_contributing_tables_name_exist():
    tables = README.partition("## Contributing")[2] + PAGES["docs/contributing.md"]
    named = re.findall(r"`([\w/]+/(?:\w+\.py)?)`", tables)

    assert len(named) >= 5
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "hfgpt" / name).exists(), name


def test_the_table_of_extras_names_all_that_a_user_may_want_and_what_they_bring():
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    brought = {
        extra: [re.match(r"[\w-]+", package)[0] for package in packages]
        for extra, packages in asked.items()
        if extra != "test"
    }

    shown = {}
    for extras, packages in re.findall(
        r"^\| ((?:`\w+`(?:, )?)+) \| ([\w,;\- ]+) \| .* \|$", INSTALL, flags=re.MULTILINE
    ):
        names = re.findall(r"`(\w+)`", extras)
        shown |= {name: part.split(", ") for name, part in zip(names, packages.split("; "), strict=True)}

    assert shown == brought


def test_the_table_of_formats_names_all_that_can_be_written():
    from hfgpt.weights import WRITERS

    rows = re.findall(r"^\| `([\w.-]+)`: .*\| ✔ \| ✔ \| bit for bit \|$", WEIGHTS, flags=re.MULTILINE)

    assert {*rows} == {*WRITERS}  # test_round_trips.py takes each there and back


def test_the_readme_measures_what_lm_eval_measures():
    tables = EVALUATION.partition("## How to measure a model")[2].partition("```text\n")[2].partition("```")[0]

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


def korean_commands():
    """The commands of the table in README.ko.md, in their order, but for `make` and what waits for a person's words."""
    return [line for line in re.findall(r"\| `([^`]+)` \|$", KOREAN, flags=re.MULTILINE) if line.startswith("hfgpt ")]


def test_the_korean_readme_shows_every_command():
    from hfgpt.cli.app import ORDER_OF_THE_JOB

    # Those left out need a machine for themselves, or a GPT that somebody has.
    assert {line.split()[1] for line in korean_commands()} == {*ORDER_OF_THE_JOB} - {"bench", "adopt"}
    assert "`hfgpt adopt " in (ROOT / "README.ko.md").read_text(encoding="utf-8")
    assert any("옛날 옛적에" in line for line in korean_commands())


@pytest.mark.slow
def test_the_commands_of_the_korean_readme_run(folder):
    with TestHub({"hf_token": ["user"]}) as hub:
        for line in korean_commands():
            if not line.startswith("hfgpt lecture"):  # test_lecture.py runs it
                run(["bash", "-c", smaller(line) + " < /dev/null"], folder, hub.url)
