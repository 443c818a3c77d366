"""The command line as a whole: help, misuse, terminals, pipes and shells."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import typer
from commands import Result, assert_refused, hfgpt, process, shell

import hfgpt as package
from hfgpt.cli import describe_missing, main
from hfgpt.cli.app import ORDER_OF_THE_JOB, PARTS_OF_THE_JOB, app, complete_recipe, recipe_keys
from hfgpt.config.loading import MODEL_FIELDS, flatten, load_config
from hfgpt.config.schema import RunConfig
from hfgpt.system.extras import needs

COMMANDS = sorted(typer.main.get_command(app).commands)


def test_help_lists_the_commands_in_the_order_of_the_job():
    printed = hfgpt("--help")

    listed = printed.out.partition("Prepare")[2]
    commands = re.findall(r"^\W+([a-z-]+)  ", listed, flags=re.MULTILINE)
    assert printed.code == 0
    assert commands == [name for name in ORDER_OF_THE_JOB if name in COMMANDS]
    titles = [listed.index(f"─ {part} ─") for part in list(PARTS_OF_THE_JOB)[1:]]
    assert titles == sorted(titles)


def test_hfgpt_alone_shows_what_there_is():
    printed = hfgpt()

    assert (printed.code, printed.err) == (2, "")
    assert "Usage: hfgpt" in printed.out


def test_version_is_that_of_the_package():
    assert hfgpt("--version") == Result(0, f"hfgpt {package.__version__}\n", "")


@pytest.mark.parametrize("columns", [20, 40, 200])
def test_help_fits_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))

    for words in (["--help"], ["train", "--help"], ["convert", "--help"]):
        assert max(map(len, hfgpt(*words).out.splitlines())) <= columns


@pytest.mark.parametrize("command", [*COMMANDS, "tokenizer train", "data prepare"])
def test_every_command_explains_itself(command):
    printed = hfgpt(*command.split(), "--help")

    assert printed.code == 0
    assert "Usage: hfgpt" in printed.out


def test_help_is_quick_because_it_imports_no_library(tmp_path):
    ran = process("-X", "importtime", "-m", "hfgpt", "--help", folder=tmp_path)

    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert ran.returncode == 0
    assert "Train a model by a recipe" in ran.stdout
    assert "hfgpt.cli" in imported
    assert not {"torch", "transformers", "datasets", "accelerate", "numpy"} & imported


def test_a_missing_package_is_named_with_the_extra_that_brings_it():
    def missing(name):
        return describe_missing(ModuleNotFoundError(f"No module named {name!r}", name=name))

    assert missing("gguf") == needs("this", "gguf")
    assert missing("google_crc32c") == needs("this", "google-crc32c")
    assert missing("lm_eval.tasks") == needs("this", "lm-eval")
    assert missing("pytest") is None
    assert missing("hfgpt.nowhere") is None  # that is no fault of the user's: the traceback is shown


def test_a_reader_that_has_gone_a_full_disk_and_closed_streams_cause_no_traceback():
    lines = {
        "gone": "(sleep 0.1; hfgpt --version; echo $? >&2) | true",
        "gone from help": "(sleep 0.1; hfgpt --help; echo $? >&2) | true",
        "full": "hfgpt --version > /dev/full; echo $?",
        "closed": "hfgpt --version >&-; echo $?",
        "closed stderr": "hfgpt trian 2>&-; echo $?",
    }

    said = {name: (ran.stdout + ran.stderr).decode() for name, ran in ((name, shell(lines[name])) for name in lines)}

    assert said == {
        "gone": "1\n",
        "gone from help": "1\n",
        "full": "1\nerror: [Errno 28] No space left on device\n",
        "closed": "0\n",
        "closed stderr": "2\n",
    }


def test_a_terminal_without_utf8_gets_escapes_that_mean_the_same(world, monkeypatch):
    def written(*words):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "argv", ["hfgpt", *words])
        with contextlib.redirect_stdout(stdout), pytest.raises(SystemExit):
            main()
        return stdout.buffer.getvalue().decode("ascii")

    words = ["tiny.yaml", "sample.prompt=größer 한 🙂"]
    Path("printed.yaml").write_text(written("config", *words))
    assert load_config("printed.yaml") == load_config(*words[:1], words[1:])
    assert json.loads(written("config", *words, "--json"))["config"]["sample"]["prompt"] == "größer 한 🙂"
    # What YAML and JSON have no part in.
    assert written("generate", "out/accelerate", "größer 한 🙂", "--max-new-tokens", "1").startswith(
        r"gr\xf6\xdfer \ud55c \U0001f642"
    )


def test_names_of_files_may_have_any_letters(world):
    shutil.copy("tiny.yaml", "größer 한 🙂.yaml")

    assert "\nseed: 0 " in hfgpt("config", "größer 한 🙂.yaml").out
    assert "no recipe 'größe 한.yaml'" in hfgpt("config", "größe 한.yaml").err


@pytest.mark.parametrize(("variable", "is_coloured"), [("NO_COLOR", False), ("FORCE_COLOR", True)])
def test_colours_are_left_out_where_they_are_not_wanted(variable, is_coloured):
    coloured = shell("hfgpt --help", **{variable: "1", "TERM": "xterm"})

    assert (b"\x1b[1m" in coloured.stdout or b"\x1b[36m" in coloured.stdout) == is_coloured


def test_the_keys_that_are_completed_are_those_of_a_recipe():
    keys = set(recipe_keys())

    assert {key for key in keys if not key.startswith("model.")} == {*flatten(asdict(RunConfig()))} - {"model"}
    assert {key.removeprefix("model.") for key in keys if key.startswith("model.")} <= MODEL_FIELDS


def test_recipes_and_folders_are_completed(world):
    assert complete_recipe("") == ["demo", "finetune", "tiny.yaml", "out/"]
    assert complete_recipe("ti") == ["tiny.yaml"]
    assert complete_recipe("de") == ["demo"]
    assert complete_recipe("out/a") == ["out/accelerate/"]
    assert "out/accelerate/run.yaml" in complete_recipe("out/accelerate/")
    assert complete_recipe("nowhere/") == []


def test_the_shell_is_offered_commands_recipes_and_keys_without_the_wait_for_a_library():
    complete = "COMP_CWORD=%d COMP_WORDS='%s' _HFGPT_COMPLETE=complete_bash hfgpt"

    offered = [
        shell(complete % (number, words), PYTHONPROFILEIMPORTTIME="1")
        for number, words in [(1, "hfgpt tra"), (3, "hfgpt train demo optim.learn"), (2, "hfgpt train dem")]
    ]

    assert [each.stdout.decode().split() for each in offered] == [["train"], ["optim.learning_rate="], ["demo"]]
    assert b"| torch" not in offered[1].stderr
    assert b"hfgpt.cli" in offered[1].stderr


def test_a_shell_can_be_taught_to_complete(tmp_path):
    # It goes by the shell above it: of a last command, bash itself would take the place.
    taught = shell("hfgpt --show-completion; exit $?", HOME=str(tmp_path), SHELL="/bin/bash")

    assert taught.returncode == 0
    assert b"_HFGPT_COMPLETE=complete_bash" in taught.stdout


@pytest.mark.parametrize("words", ["--debug train dmeo", "train dmeo --debug"])
def test_debug_lets_the_error_through(words):
    with pytest.raises(ValueError, match="no recipe 'dmeo'"):
        hfgpt(*words.split())


def test_debug_shows_the_traceback(tmp_path):
    ran = process("-m", "hfgpt", "--debug", "train", "dmeo", folder=tmp_path)

    assert ran.returncode == 1
    assert ran.stderr.startswith("Traceback (most recent call last):")
    assert ran.stderr.rstrip().splitlines()[-1].startswith("ValueError: no recipe 'dmeo'")


def test_the_installed_command_is_the_same(tmp_path):
    command = Path(sys.executable).with_name("hfgpt")

    ran = subprocess.run([command, "train", "dmeo"], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert ran.stderr.startswith("error: no recipe 'dmeo'")


MISUSE = [
    ("train", "'RECIPE'", "See `hfgpt train --help`."),
    ("trian demo", "'trian'", "Did you mean 'train'?", "See `hfgpt --help`."),
    ("tokenizer trian", "'trian'", "Did you mean 'train'?", "See `hfgpt tokenizer --help`."),
    ("train demo --fast", "--fast", "See `hfgpt train --help`."),
    ("train demo --resum", "--resum", "Did you mean --resume?", "See `hfgpt train --help`."),
    ("train demo --train.max_steps=3", "no dashes", "`train.max_steps=VALUE`"),
    ("tokenizer train", "'folder'", "missing"),
    ("evaluate small --data a.txt --batch-size many", "'--batch-size'", "integer"),
    ("evaluate small --data a.txt --batch-size 0", "'--batch-size'", "1"),
    ("evaluate small large --data a.txt", "unexpected", "large"),
    ("generate small", "give a PROMPT, the text to continue, or `--prompts FILE`, one of them: got neither"),
    ("generate small The --prompts text.txt", "give a PROMPT", "one of them: got both"),
    ("explore small", "missing argument"),
    ("generate small The --seed", "'--seed'", "requires an argument"),
]


@pytest.mark.parametrize("case", MISUSE, ids=lambda case: case[0])
def test_a_wrong_command_line_gets_one_line_and_exit_code_2(case):
    command, *words = case

    assert_refused(hfgpt(*command.split()), *words)


@pytest.mark.parametrize(
    "command",
    [
        "generate {} The",  # the prompt first
        "generate small The {}",
        "evaluate {} --data a.txt",
        "explore small The --compare {}",
        "generate small The --compare {}",
        "generate small The --max-new-tokens {}",
        "generate small --prompts {}",
        "convert {} out --to gpt2",
        "train demo {}",
        "train demo output_dir= sample.prompt={} ",
        "train {}",
        "config demo train.precision={}",
        "{}",
    ],
)
@pytest.mark.parametrize("text", ["The quick brown fox. " * 150, "L'été " * 500, "x" * 3000])
def test_a_long_text_is_quoted_by_its_beginning(command, text):
    said = hfgpt(*(word.format(text) for word in command.split()))

    assert said.code == 2
    assert said.err.count("\n") == 1
    assert len(said.err) < 700, said.err
