"""The command line as a whole: help, misuse, terminals, pipes and shells."""

import contextlib
import errno
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from commands import Result, assert_refused, hfgpt, process, shell

import hfgpt as package
from hfgpt.cli import describe, describe_missing, main
from hfgpt.cli.app import ORDER_OF_THE_JOB, PARTS_OF_THE_JOB, app, complete_recipe
from hfgpt.config.loading import load_config
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
    ("train", "'RECIPE'", "Write `hfgpt train RECIPE [KEY.PATH=VALUE]...`", "See `hfgpt train --help`."),
    ("trian demo", "'trian'", "Did you mean 'train'?", "See `hfgpt --help`."),
    ("tokenizer trian", "'trian'", "Did you mean 'train'?", "See `hfgpt tokenizer --help`."),
    ("train demo --fast", "--fast", "See `hfgpt train --help`."),
    ("train demo --resum", "--resum", "Did you mean `--resume`?", "See `hfgpt train --help`."),
    ("tokenizer train", "'FOLDER'", "missing"),
    ("evaluate small large --data a.txt", "unexpected", "large"),
    ("generate small", "give a PROMPT, the text to continue, or `--prompts FILE`, one of them: got neither"),
    ("generate small The --prompts text.txt", "give a PROMPT", "one of them: got both"),
    ("explore small", "missing argument 'TEXT'", "Write `hfgpt explore MODEL TEXT`"),
    ("generate small The --seed", "'--seed'", "requires an argument"),
    # Options that are keys of a recipe.
    ("train demo --train.max_steps=3", "no dashes", "`train.max_steps=3`"),
    ("train demo --max-steps 5", "--max-steps", "Did you mean `train.max_steps=5`?"),
    ("train demo --max_steps 5 --resume", "Did you mean `train.max_steps=5`?"),
    ("train demo --lr=1e-3", "--lr", "Did you mean `optim.learning_rate=1e-3`?"),
    ("train demo -lr 1e-3", "-lr", "Did you mean `optim.learning_rate=1e-3`?"),
    ("train demo --epochs", "Did you mean `train.epochs=VALUE`?"),
    ("train demo --per_device_train_batch_size 8", "Did you mean `train.batch_size=8`?"),
    ("train demo --data my.txt", "Did you mean `data.files=my.txt`?"),
    ("train demo --bf16", "`train.precision=bf16`"),
    ("train demo --output-dir out/a", "Did you mean `output_dir=out/a`?"),
    ("config demo --n-layer 2", "Did you mean `model.n_layer=2`?"),
    ("data prepare demo --block-size 5", "Did you mean `data.block_size=5`?"),
    ("tokenizer train new --vocab_size 300", "Did you mean `tokenizer.vocab_size=300`?"),
    ("lecture --epochs 3", "Did you mean `train.epochs=3`?"),
    # Options that are called otherwise elsewhere.
    ("generate small The --max_new_tokens 5", "Did you mean `--max-new-tokens`?"),
    ("generate small The --max-length 5", "Did you mean `--max-new-tokens`?"),
    ("generate small The -n 5", "Did you mean `--samples`?"),
    ("generate small The --temp=5", "Did you mean `--temperature`?"),
    ("evaluate small --file a.txt", "Did you mean `--data`?"),
    ("-V", "Did you mean `--version`?"),
    # Refused as it is, without a word on the warm-up that it would shorten.
    ("config demo train.max_steps=0", "`train.max_steps` must be at least 1, got 0."),
    ("config demo train.max_steps=-5", "`train.max_steps` must be at least 1, got -5."),
    # Values of options.
    ("evaluate small --data a.txt --batch-size many", "`--batch-size` must be a whole number, got 'many'"),
    ("evaluate small --data a.txt --batch-size 1e3", "`--batch-size` must be a whole number, got '1e3'"),
    ("evaluate small --data a.txt --batch-size 0", "`--batch-size` must be at least 1, got '0'"),
    ("generate small The --temperature hot", "`--temperature` must be a number, got 'hot'"),
    ("generate small The --seed 한", "`--seed` must be a whole number, got '한'"),
    ("verify --random small --layers two", "`--layers` must be a whole number, got 'two'"),
    ("generate small The --samples 99999999999999999999", "`--samples` must be at most 1000000"),
    ("explore small The --steps -1", "`--steps` must be at least 0, got '-1'"),
]


@pytest.mark.parametrize("case", MISUSE, ids=lambda case: ascii(case[0]))
def test_a_wrong_command_line_gets_one_line_and_exit_code_2(case):
    command, *words = case

    assert_refused(hfgpt(*command.split()), *words)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["train", ""], "RECIPE"),
        (["train", "demo", ""], "KEY.PATH=VALUE"),
        (["generate", "", "The"], "MODEL"),
        (["evaluate", "small", "--data", ""], "--data"),
        (["evaluate", "small", "--data=t.txt", "--tokenizer="], "--tokenizer"),
        (["generate", "small", "--prompts", ""], "--prompts"),
        (["tokenizer", "train", ""], "FOLDER"),
        (["convert", "small", "", "--to", "gpt2"], "NEW"),
        (["compare", "", "small"], "RUN"),
        (["recipes", ""], "NAME"),
        (["verify", ""], "MODEL"),
        (["pull", "user/model", ""], "FOLDER"),
        (["push", "small", ""], "USER/MODEL"),
    ],
)
def test_an_empty_word_is_not_taken_for_this_folder(words, name):
    assert_refused(hfgpt(*words), f"`{name}` is empty. Give it a value, or leave it out.")


def test_a_path_that_the_system_refuses_is_named_with_what_to_do(tmp_path):
    def refused(kind, path):
        return describe(OSError(kind, "as the system says it", str(path)))

    (tmp_path / "글 모음.txt").touch()
    text = tmp_path / "글 모음.txt"
    assert refused(errno.ENOTDIR, text / "x") == f"{text / 'x'}: {text} is a file. Name a folder there."
    assert refused(errno.ENOENT, tmp_path / "no" / ".a.png.tmp") == (
        f"{tmp_path / 'no' / 'a.png'}: there is no folder {tmp_path / 'no'}. Make it first, or name another."
    )
    assert refused(errno.EISDIR, tmp_path) == f"{tmp_path} is a folder. Name a file."
    assert refused(errno.EACCES, text).startswith(f"{text} may not be used by you: no permission.")
    assert refused(errno.EROFS, text).startswith(f"{text} is on a disk that cannot be written to.")


def test_a_typo_in_a_path_is_answered_with_the_file_beside_it(tmp_path, monkeypatch):
    (tmp_path / "full name 한글").mkdir()
    (tmp_path / "full name 한글" / "글 모음.txt").touch()
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "prompts.txt").touch()
    monkeypatch.chdir(tmp_path)

    assert_refused(hfgpt("config", "mine.yml"), "no recipe 'mine.yml'", "Did you mean `mine.yaml`?")
    assert_refused(hfgpt("train", "dmeo"), "Did you mean `demo`?")
    assert_refused(hfgpt("recipes", "lectrue"), "Did you mean `lecture`?")
    said = hfgpt("data", "prepare", "demo", "data.source=null", "data.files=full name 한글/글모음.txt")
    assert_refused(said, "Did you mean `full name 한글/글 모음.txt`?")


def test_the_folder_of_a_run_is_no_recipe_and_says_where_its_own_is(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").touch()
    monkeypatch.chdir(tmp_path)

    assert_refused(hfgpt("train", "run"), "'run' is the folder of a run. Its recipe is `run/run.yaml`.")


COMMANDS_ELSEWHERE = {
    "chat": "`hfgpt play MODEL`",
    "serve": "hfgpt has no server",
    "finetune": "`hfgpt train finetune data.files=my.txt`",
    "eval": "`hfgpt evaluate MODEL --data FILE`",
    "download": "`hfgpt pull USER/MODEL FOLDER`",
    "upload": "`hfgpt push FOLDER USER/MODEL`",
    "sample": "`hfgpt generate MODEL PROMPT`",
    "prepare": "`hfgpt data prepare RECIPE`",
    "version": "`hfgpt --version`",
    "resume": "`hfgpt train RECIPE --resume`",
    "login": "`hf auth login`",
    "quantize": "`hfgpt convert FROM TO --to FORMAT`",
}


@pytest.mark.parametrize("command", COMMANDS_ELSEWHERE)
def test_a_command_of_another_program_is_answered_with_what_is_done_here(command):
    assert_refused(hfgpt(command, "x"), f"no such command '{command}'", COMMANDS_ELSEWHERE[command])


def test_every_command_that_an_answer_names_exists():
    from hfgpt.cli.misuse import COMMANDS_ELSEWHERE, OPTIONS_ELSEWHERE

    assert {name for text in COMMANDS_ELSEWHERE.values() for name in re.findall(r"`hfgpt ([a-z][\w-]*)", text)} <= {
        *COMMANDS
    }
    assert not {*COMMANDS_ELSEWHERE} & {*COMMANDS}
    everywhere = "".join(hfgpt(name, "--help").out for name in COMMANDS) + hfgpt("--help").out
    for option in OPTIONS_ELSEWHERE.values():
        assert f"--{option} " in everywhere


@pytest.mark.parametrize("command", ["", "train", "tokenizer train", "data"])
def test_help_as_a_command_is_the_option_help(command):
    assert hfgpt("help", *command.split()) == hfgpt(*command.split(), "--help")


def test_help_on_a_command_that_does_not_exist_names_the_nearest():
    assert_refused(hfgpt("help", "trian"), "no such command 'trian'", "Did you mean 'train'?")


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("train demo optim.lr=1", "optim.learning_rate=1"),
        ("train demo --max-steps 5", "train.max_steps=5"),
        ("train demo optim.schedule=cosin", "'cosine'"),
        ("train demo train.batch_size=0", "at least 1"),
        ("config demo max_steps=5", "train.max_steps=5"),
        ("data prepare demo lr=1", "optim.learning_rate=1"),
        ("tokenizer train new vocab_size=300", "tokenizer.vocab_size=300"),
        ("train dmeo", "no recipe 'dmeo'"),
        ("train wrong.yaml", "optim: {learning_rate: 1}"),
        ("generate out The --top-k many", "whole number"),
    ],
)
def test_wrong_words_are_answered_before_torch_is_imported(tmp_path, words, answer):
    (tmp_path / "wrong.yaml").write_text("model: {n_layer: 1}\nlr: 1\n")

    ran = process("-X", "importtime", "-m", "hfgpt", *words.split(), folder=tmp_path)

    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert ran.returncode == 2
    assert answer in ran.stderr.splitlines()[-1]
    assert not {"torch", "transformers", "datasets", "accelerate"} & imported


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
