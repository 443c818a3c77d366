"""The commands as a user types them: what they do, what they print and where, and what they say to bad input."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import pytest
import torch
import typer
from accelerate.state import AcceleratorState

import hfgpt as package
from hfgpt.cli import describe, describe_missing, join_resume, main
from hfgpt.cli.app import ORDER_OF_THE_JOB, PARTS_OF_THE_JOB, app, complete_recipe, recipe_keys
from hfgpt.config.loading import flatten, load_config
from hfgpt.config.schema import MODEL_FIELDS, RunConfig
from hfgpt.data.tokenizer import load_tokenizer
from hfgpt.evaluation.report import measure, render
from hfgpt.generation.params import OPTIONS, SamplingParams
from hfgpt.system.doctor import Finding
from hfgpt.system.extras import needs

COMMANDS = sorted(typer.main.get_command(app).commands)

RECIPE = """\
output_dir: out/accelerate
model: {n_positions: 64, n_embd: 32, n_layer: 2, n_head: 4, resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}
tokenizer: {vocab_size: 512}
data: {files: text.txt, block_size: 32}
optim: {learning_rate: 1.0e-2, warmup_steps: 2}
train: {max_steps: 6, batch_size: 4, eval_every: 3, eval_rows: 8, save_every: 3}
sample: {prompt: "The", max_new_tokens: 10}
"""
LOOPS = ["accelerate", "trainer"]


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code, and what it said."""

    code: int
    out: str
    err: str


def hfgpt(*words):
    """Run the command line in this process, in the current folder."""
    out, err = io.StringIO(), io.StringIO()
    AcceleratorState._reset_state(True)  # it holds for a process; other tests may have left another precision
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["hfgpt", *map(str, words)])
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")  # `main` sets it for good
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    return Result(code, out.getvalue(), err.getvalue())


def process(*words, folder):
    """Run a program in a process of its own."""
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False)


def shell(line, **environment):
    """Run a line of bash, in which `hfgpt` is the installed command."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", line], env={**os.environ, "PATH": path, **environment}, capture_output=True, check=False
    )


def contents(folder):
    """Every path below a folder, and what is in it."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield
    AcceleratorState._reset_state(True)


@dataclass(frozen=True)
class World:
    """A folder with a text, a recipe and a finished run of it by each loop, and what the runs said."""

    folder: Path
    said: dict[str, Result]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    text = "\n".join(topics[name] for name in sorted(topics))[:20_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    (folder / "tiny.yaml").write_text(RECIPE)
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for loop in LOOPS:
            said[loop] = hfgpt("train", "tiny.yaml", f"loop={loop}", f"output_dir=out/{loop}")
    return World(folder, said)


@pytest.fixture
def world(finished, tmp_path, monkeypatch):
    """A copy of it that a test may change, and is in."""
    folder = tmp_path / "world"
    shutil.copytree(finished.folder, folder)
    monkeypatch.chdir(folder)
    return folder


# --- what the commands do


@pytest.mark.parametrize("loop", LOOPS)
def test_a_tiny_recipe_trains_evaluates_and_generates(finished, world, loop):
    trained = finished.said[loop]
    assert trained.code == 0
    assert trained.out == ""  # talk goes to stderr
    assert "step 6/6  loss" in trained.err
    assert "validation perplexity" in trained.err
    assert "Traceback" not in trained.err
    left = {path.name for path in Path(f"out/{loop}").iterdir()}
    assert left >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "gpt.py"}
    assert "checks: loss" in trained.err
    assert "% of peak" in trained.err
    assert left >= {"run.yaml", "metrics.jsonl", "results.json", "loss.png", "samples.md", "checkpoint-3"}

    evaluated = hfgpt("evaluate", f"out/{loop}", "--data", "text.txt", "--json")
    generated = hfgpt("generate", f"out/{loop}", "The", "--max-new-tokens", 20, "--seed", 1)

    assert (evaluated.code, evaluated.err) == (0, "")
    expected = measure(f"out/{loop}", ["text.txt"])
    printed = json.loads(evaluated.out)
    assert (printed["model"], printed["tasks"]) == (f"out/{loop}", {})
    for result, measured in zip(printed["text"]["measurements"], expected.text.measurements, strict=True):
        assert {**result, "elapsed_seconds": None} == {**asdict(measured), "elapsed_seconds": None}
        assert 2 < result["loss"] < 6.3  # less than log(512)
    assert (generated.code, generated.err) == (0, "")
    assert generated.out.startswith("The")
    assert len(generated.out) > len("The\n")


def test_both_loops_say_the_same_losses(finished):
    losses = [re.findall(r"step \d/6 .*?loss [\d.]+", finished.said[loop].err) for loop in LOOPS]

    assert losses[0] == losses[1]
    assert len(losses[0]) == 6 + 3  # a line a step, and evaluations before, within and after


def test_the_second_call_says_that_the_run_is_finished_and_changes_nothing(world):
    before = contents(world)

    again = hfgpt("train", "tiny.yaml")

    assert (again.code, again.out) == (0, "")
    assert "out/accelerate holds this run, finished." in again.err
    assert "validation perplexity" in again.err
    assert contents(world) == before


def test_train_prints_its_results_as_json(world):
    fresh = hfgpt("train", "tiny.yaml", "output_dir=out/new", "train.max_steps=3", "--json")
    again = hfgpt("train", "tiny.yaml", "output_dir=out/new", "train.max_steps=3", "--json")

    results = json.loads(Path("out/new/results.json").read_text())
    assert (fresh.code, json.loads(fresh.out), fresh.out.count("\n")) == (0, results, 1)
    assert (again.code, json.loads(again.out), again.out.count("\n")) == (0, results, 1)
    names = {"step", "tokens", "train_loss", "val_loss", "val_perplexity", "unigram_perplexity", "bigram_perplexity"}
    assert set(results) >= names | {"peak_memory_bytes", "elapsed_seconds", "environment"}
    assert results["step"] == 3


def unfinish(folder):
    """Make a run what it was when it was killed after its first checkpoint."""
    for name in ("results.json", "loss.png", "model.safetensors"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoint-6")


@pytest.mark.parametrize(
    "words",
    [
        ["tiny.yaml", "--resume"],
        ["tiny.yaml", "--resume", "out/accelerate/checkpoint-3"],
        ["--resume", "tiny.yaml"],
        ["tiny.yaml", "--resume", "seed=0", "loop=accelerate"],
        ["tiny.yaml", "seed=0", "--resume=out/accelerate/checkpoint-3"],
    ],
    ids=" ".join,
)
def test_an_unfinished_run_goes_on_to_the_same_end(world, words):
    folder = Path("out/accelerate")
    expected = {name: (folder / name).read_bytes() for name in ("model.safetensors", "samples.md")}
    unfinish(folder)

    resumed = hfgpt("train", *words)

    assert resumed.code == 0
    assert "going on from out/accelerate/checkpoint-3 at step 3" in resumed.err
    assert {name: (folder / name).read_bytes() for name in expected} == expected


def test_resume_without_a_checkpoint_starts(world):
    started = hfgpt("train", "tiny.yaml", "output_dir=out/new", "train.max_steps=2", "--resume", "train.eval_every=2")

    assert started.code == 0
    assert "going on" not in started.err
    assert Path("out/new/results.json").is_file()


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        ("train demo", "train demo"),
        ("train demo --resume", "train demo --resume="),
        ("train demo --resume out/demo/checkpoint-3", "train demo --resume=out/demo/checkpoint-3"),
        ("train demo --resume=out/checkpoint-3", "train demo --resume=out/checkpoint-3"),
        ("train demo --resume train.max_steps=3", "train demo --resume= train.max_steps=3"),
        ("train demo --resume --json", "train demo --resume= --json"),
        ("train demo seed=1 --resume out/c --json", "train demo seed=1 --resume=out/c --json"),
        ("train --resume demo", "train --resume= demo"),
        ("train --json --resume demo seed=1", "train --json --resume= demo seed=1"),
        ("evaluate out --data a.txt", "evaluate out --data a.txt"),
    ],
)
def test_resume_takes_a_path_only_where_one_stands(words, joined):
    assert join_resume(words.split()) == joined.split()


def test_config_prints_yaml_that_loads_equal(world):
    printed = hfgpt("config", "demo", "sample.prompt=${x}: 1e3", "model.n_embd=96")

    assert (printed.code, printed.err) == (0, "")
    Path("printed.yaml").write_text(printed.out, encoding="utf-8")
    assert load_config("printed.yaml") == load_config("demo", ["sample.prompt=${x}: 1e3", "model.n_embd=96"])


def test_config_says_where_each_value_comes_from(world):
    words = ["tiny.yaml", "seed=3", "model.n_layer=7", "optim.warmup_steps=2", "optim.weight_decay=0.1"]

    printed, as_json = hfgpt("config", *words), hfgpt("config", *words, "--json")

    origins = json.loads(as_json.out)["origins"]
    assert origins["output_dir"] == "recipe"
    assert origins["seed"] == "override"
    assert origins["loop"] == "default"
    assert origins["model.num_hidden_layers"] == "override"  # `n_layer` in the recipe too
    assert origins["model.hidden_size"] == "recipe"
    assert origins["optim.warmup_steps"] == "override"  # though the recipe says the same
    assert origins["optim.weight_decay"] == "override"  # though it is the default
    assert origins["data.files"] == "recipe"
    assert re.search(r"^seed: 3 +# override$", printed.out, flags=re.MULTILINE)
    assert re.search(r"^  num_hidden_layers: 7 +# override$", printed.out, flags=re.MULTILINE)
    assert re.search(r"^  stride: null +# default$", printed.out, flags=re.MULTILINE)
    assert flatten(json.loads(as_json.out)["config"]).keys() == origins.keys()
    assert printed.out.count("  # ") == len(origins)


@pytest.mark.parametrize("prompt", ["x # y", "a: b", "two\nlines", "long " * 60, "한국어 🙂", "'", "null", "- a", ""])
def test_comments_do_not_change_what_is_printed(world, prompt):
    words = [f"sample.prompt={prompt}", "data.files=[a.txt,b.txt]"]

    printed = hfgpt("config", "tiny.yaml", *words)

    Path("printed.yaml").write_text(printed.out, encoding="utf-8")
    assert load_config("printed.yaml") == load_config(
        "tiny.yaml", [f"sample.prompt={prompt}", "data.files=[a.txt,b.txt]"]
    )


def test_evaluate_prints_a_table_to_read(world):
    words = ["--stride", 7, "--stride", 20, "--context", 40, "--first-token", "text", "--device", "cpu"]
    printed = hfgpt("evaluate", "out/accelerate", "--data", "text.txt", "--batch-size", 50, *words)

    report = measure("out/accelerate", ["text.txt"], strides=[7, 20], context=40, first_token="text", batch_size=50)
    assert (printed.code, printed.err) == (0, "")

    def measured(text):
        return [line for line in text.splitlines() if not line.startswith(("time", "peak memory"))]

    assert measured(printed.out) == measured(render(report))


def test_evaluate_puts_the_figures_of_tasks_beside_a_run_s_own(world):
    rows = [{"text": f"The {word}"} for word in ("object", "value", "name")]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "nouns",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "The",
        "doc_to_target": "{{text[3:]}}",
        "metric_list": [{"metric": "perplexity"}],
    }
    Path("nouns.yaml").write_text(json.dumps(task))
    before = json.loads(Path("out/accelerate/results.json").read_text())

    printed = hfgpt("evaluate", "out/accelerate", "--tasks", "nouns.yaml", "--json")

    assert printed.code == 0
    assert printed.err.splitlines()[-1] == "the tasks' figures are in out/accelerate/results.json, too"
    (figures,) = json.loads(printed.out)["tasks"].values()
    assert figures["perplexity"] > 1
    assert json.loads(Path("out/accelerate/results.json").read_text()) == {**before, "lm_eval": {"nouns": figures}}


def test_generate_prints_prompt_and_text_as_json(world):
    words = ["generate", "out/accelerate", "한국어 The", "--max-new-tokens", 10, "--seed", 3]

    as_json, printed = hfgpt(*words, "--json"), hfgpt(*words)

    result = json.loads(as_json.out)
    assert (as_json.code, as_json.err, as_json.out.count("\n")) == (0, "", 1)
    assert result["prompt"] == "한국어 The"
    assert result["text"].startswith("한국어 The")
    assert printed.out == result["text"] + "\n"
    assert "한국어" in as_json.out  # not as \\u escapes


def test_generate_prints_the_prompt_though_nothing_follows(world, monkeypatch):
    monkeypatch.setattr("hfgpt.generation.generator.continue_text", lambda *args: iter([]))

    assert hfgpt("generate", "out/accelerate", "The").out == "The\n"


def test_generate_hands_every_option_on(world, monkeypatch):
    heard = []
    monkeypatch.setattr(
        "hfgpt.generation.generator.continue_text",
        lambda generator, prompt, params: iter([heard.append((generator.source, prompt, params)) or "!"]),
    )

    sampling = "--max-new-tokens 7 --temperature 0.5 --top-k 4 --top-p 0.75 --min-p 0.1 --seed 9 --stop a\\n --stop b"
    searching = (
        "--num-beams 3 --length-penalty 0.5 --early-stopping never --repetition-penalty 2 --no-repeat-ngram-size 3"
    )
    for options in (sampling, searching):
        hfgpt("generate", "out/accelerate", "a b", *options.split())

    sampled = SamplingParams(7, 0.5, 4, 0.75, 0.1, stop=("a\n", "b"), seed=9)
    searched = SamplingParams(
        num_beams=3, length_penalty=0.5, early_stopping="never", repetition_penalty=2.0, no_repeat_ngram_size=3
    )
    assert heard == [("out/accelerate", "a b", sampled), ("out/accelerate", "a b", searched)]


def test_generate_has_an_option_for_every_field_of_the_params(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    printed = hfgpt("generate", "--help").out

    for name, field in OPTIONS.items():
        assert re.search(rf"--{name.replace('_', '-')} .*{re.escape(field.metadata['help'])}", printed)
    assert "Tokens to write. [default: (100)]" in printed


def test_generate_answers_many_prompts_in_their_order(world):
    Path("p.jsonl").write_text('{"prompt": "The", "id": 7}\n{"id": 8, "prompt": "한국어"}\n', encoding="utf-8")
    words = ["generate", "out/accelerate", "--prompts", "p.jsonl", "--samples", 2, "--max-new-tokens", 8, "--seed", 3]

    as_json, printed = hfgpt(*words, "--json", "--batch-size", 3), hfgpt(*words)

    records = [json.loads(line) for line in as_json.out.splitlines()]
    assert (as_json.code, as_json.err, printed.code, printed.err) == (0, "", 0, "")
    assert [(each["id"], each["prompt"], each["seed"]) for each in records] == [
        *((7, "The", 3), (7, "The", 4), (8, "한국어", 3), (8, "한국어", 4))
    ]
    alone = hfgpt("generate", "out/accelerate", "한국어", "--max-new-tokens", 8, "--seed", 4).out
    assert records[3]["text"] + "\n" == alone
    for number, each in enumerate(records):
        heading = f"--- prompt {number // 2 + 1}/2, sample {number % 2 + 1}/2, seed {each['seed']} ---"
        assert f"{heading}\n{each['text']}\n" in printed.out


def test_generate_compares_settings(world):
    words = ["generate", "out/accelerate", "The", "--seed", 3, "--max-new-tokens", 8]
    words += ["--compare", "temperature=2", "--compare", "num_beams=2"]

    as_json, printed = hfgpt(*words, "--json"), hfgpt(*words)

    hot, searched = (json.loads(line) for line in as_json.out.splitlines())
    assert (hot["settings"], searched["settings"]) == ("temperature=2", "num_beams=2")
    assert (hot["seed"], "seed" in searched, searched["score"] < 0) == (3, False, True)
    assert hot["text"] + "\n" == hfgpt(*words[:7], "--temperature", 2).out
    for each in (hot, searched):
        assert re.search(rf"--- {each['settings']} \(.*\) ---\n{re.escape(each['text'])}\n", printed.out)


def test_explore_prints_tables_and_writes_what_it_is_asked_for(world):
    words = ["explore", "out/accelerate", "The object is", "--plot", "next.png", "--html", "page.html"]

    printed, again, replaced = hfgpt(*words), hfgpt(*words), hfgpt(*words, "--overwrite", "--json")

    assert (printed.code, printed.err) == (0, "wrote next.png\nwrote page.html\n")
    assert "temperature=0.1" in printed.out
    assert Path("next.png").read_bytes().startswith(b"\x89PNG")
    assert "The object is" in Path("page.html").read_text(encoding="utf-8")
    assert (again.code, again.out) == (2, "")
    assert "next.png exists. Name another file, or add `--overwrite`." in again.err
    found = json.loads(replaced.out)
    assert (replaced.code, found["text"], len(found["distributions"])) == (0, "The object is", 4)


def test_play_answers_lines_from_a_pipe(world, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("The\n/set temprature=1\n"))

    said = hfgpt("play", "out/accelerate", "--set", "max_new_tokens=8,seed=3")

    assert said.out == hfgpt("generate", "out/accelerate", "The", "--max-new-tokens", 8, "--seed", 3).out
    assert (said.code, said.err) == (2, "error: `temprature` is no setting. Did you mean `temperature`?\n")


def test_verify_passes_a_trained_model(world):
    printed, as_json = hfgpt("verify", "out/accelerate"), hfgpt("verify", "out/accelerate", "--json")

    assert (printed.code, printed.err, as_json.code, as_json.err) == (0, "", 0, "")
    assert printed.out.endswith("passed: the same model\n")
    assert "max |Δlogit|" in printed.out
    result = json.loads(as_json.out)
    assert set(result) >= {
        "max_abs_diff",
        "max_rel_diff",
        "argmax_agreement",
        "loss_diff",
        "greedy_equal",
        "passed",
    }
    assert result["passed"] is True


def test_verify_exits_with_1_when_the_models_differ(world, monkeypatch):
    from hfgpt.evaluation import verify_gpt2

    right = verify_gpt2.to_gpt2

    def disturbed(model):
        gpt2 = right(model)
        gpt2.transformer.ln_f.bias.data += 1e-3
        return gpt2

    monkeypatch.setattr(verify_gpt2, "to_gpt2", disturbed)

    printed, as_json = hfgpt("verify", "out/accelerate"), hfgpt("verify", "out/accelerate", "--json")

    assert (printed.code, as_json.code) == (1, 1)
    assert printed.out.endswith("FAILED: outside the bounds\n")
    assert json.loads(as_json.out)["passed"] is False


def test_tokenizer_train_trains_the_tokenizer_of_the_run(world):
    trained = hfgpt("tokenizer", "train", "tok", "--recipe", "tiny.yaml", "tokenizer.vocab_size=400")
    same = hfgpt("tokenizer", "train", "same", "--recipe", "tiny.yaml")

    assert (trained.code, trained.out, trained.err) == (0, "", "400 token ids in tok\n")
    assert len(load_tokenizer("tok")) == 400
    assert same.code == 0
    assert Path("same/tokenizer.json").read_bytes() == Path("out/accelerate/tokenizer.json").read_bytes()


def test_compare_prints_a_table_and_draws_a_picture(world):
    printed = hfgpt("compare", "out/accelerate", "out/trainer")
    as_json = hfgpt("compare", "out/accelerate", "out/trainer", "--picture", "curves.png", "--json")

    assert (printed.code, as_json.code, as_json.out.count("\n")) == (0, 0, 1)
    assert printed.err == "the curves are in compare.png\n"
    rows = {line.split("  ")[0]: line.split()[-2:] for line in printed.out.splitlines()}
    assert rows["loop"] == ['"accelerate"', '"trainer"']
    assert len(set(rows["validation loss"])) == 1  # both loops take the same steps
    assert {run["name"] for run in json.loads(as_json.out)["runs"]} == {"accelerate", "trainer"}
    assert Path("compare.png").read_bytes() == Path("curves.png").read_bytes()


def test_doctor_prints_lines_to_read_or_one_object_and_fails_on_faults(monkeypatch):
    monkeypatch.setattr("hfgpt.system.doctor.findings", lambda report: [])
    printed, as_json = hfgpt("doctor"), hfgpt("doctor", "--json")
    monkeypatch.setattr("hfgpt.system.doctor.findings", lambda report: [Finding(True, "no disk.")])
    faulty = hfgpt("doctor")

    assert (printed.code, printed.err, as_json.code, as_json.out.count("\n")) == (0, "", 0, 1)
    assert printed.out.startswith("versions")
    assert set(json.loads(as_json.out)) >= {"versions", "devices", "memory", "disk", "extras", "hub", "findings"}
    assert (faulty.code, faulty.out.splitlines()[-1].split()) == (1, ["FAULT", "no", "disk."])


def test_data_prepare_counts_every_token_of_the_run(world):
    printed, as_json = hfgpt("data", "prepare", "tiny.yaml"), hfgpt("data", "prepare", "tiny.yaml", "--json")

    assert printed.code == as_json.code == 0
    result = json.loads(as_json.out)
    for name in ("train", "validation"):
        split = result[name]
        assert split["tokens"] == split["targets"] + 1 + split["remainder"]
        assert f"{split['documents']:,} documents, {split['tokens']:,} tokens in {split['rows']:,} rows" in printed.out
    assert result["train"]["tokens"] == json.loads(Path("out/accelerate/results.json").read_text())["train_tokens"]
    assert not Path("out/run").exists()


STREAM = ["data.streaming=true", "tokenizer.name=out/accelerate", "tokenizer.vocab_size=4096"]


def test_data_prepare_has_nothing_to_do_for_a_stream(world):
    refused = hfgpt("data", "prepare", "tiny.yaml", *STREAM)

    assert refused.code == 2
    assert "there is nothing to prepare" in refused.err


# --- help


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


# --- bad input


def make_files(world):
    """What the commands below are given beside the finished runs."""
    (world / "empty.txt").touch()
    (world / "short.txt").write_text("Too short.")
    (world / "latin.txt").write_bytes("café ".encode("latin-1") * 100)
    (world / "text.pdf").touch()
    (world / "lines.jsonl").write_text('{"text": "one two three"}\n' * 100)
    (world / "typo.yaml").write_text(RECIPE.replace("learning_rate", "learning_rat"))
    (world / "list.yaml").write_text("- a\n")
    finetune = [line for line in RECIPE.splitlines() if not line.startswith(("model", "tokenizer", "output_dir"))]
    (world / "finetune.yaml").write_text("\n".join(["output_dir: out/new", "init_from: small", *finetune]))
    (world / "notes").mkdir()
    (world / "notes" / "todo.txt").write_text("Not a run.")
    (world / "emptied").mkdir()

    # A run that was killed, with a checkpoint that a disk spoiled.
    killed = world / "out" / "killed"
    shutil.copytree(world / "out" / "accelerate", killed)
    unfinish(killed)
    run = (killed / "run.yaml").read_text()
    (killed / "run.yaml").write_text(run.replace("out/accelerate", "out/killed"))
    with (killed / "checkpoint-3" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")

    # A model whose tokenizer is that of a larger one.
    shutil.copytree(world / "out" / "accelerate", world / "mixed")
    small = hfgpt("train", "tiny.yaml", "output_dir=small", "tokenizer.vocab_size=300", "train.max_steps=2")
    assert small.code == 0
    for name in ("config.json", "model.safetensors"):
        shutil.copy(world / "small" / name, world / "mixed" / name)

    (world / "damaged").mkdir()
    shutil.copy(world / "small" / "config.json", world / "damaged")
    (world / "damaged" / "model.safetensors").write_bytes(b"junk")
    for name, config in [("unfitting", "{}"), ("listed", "[]")]:
        shutil.copytree(world / "small", world / name, ignore=shutil.ignore_patterns("checkpoint-*"))
        (world / name / "config.json").write_text(config)


@pytest.fixture(scope="module")
def bad_world(finished, tmp_path_factory):
    """One world for all bad input, since nothing of it may change."""
    folder = tmp_path_factory.mktemp("bad") / "world"
    shutil.copytree(finished.folder, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_files(folder)
    return folder


TRAIN = "train tiny.yaml output_dir=out/new"
BAD_INPUT = [
    # The text.
    (f"{TRAIN} data.files=missing.txt", "there is no file or folder 'missing.txt'."),
    (f"{TRAIN} data.files=null", "give `data.source` or `data.files`, one of them: got None and None."),
    (f"{TRAIN} data.files=emptied", "the folder emptied holds no file that ends in .txt"),
    (f"{TRAIN} data.files=text.pdf", "text.pdf: the name must end in one of .txt, .md, .jsonl"),
    (f"{TRAIN} data.files=latin.txt", "latin.txt is not UTF-8: byte 0xe9 at offset 3"),
    (f"{TRAIN} data.files=empty.txt", "empty.txt holds no text: every document is empty."),
    (f"{TRAIN} data.files=short.txt", "fewer than one block of 33"),
    (f"{TRAIN} data.files=[text.txt,short.txt]", "the validation split has"),
    (
        f"{TRAIN} data.files=lines.jsonl data.text_column=body",
        "lines.jsonl has no column 'body', only ['text']. Set `data.text_column`.",
    ),
    (f"{TRAIN} data.text_column=body", "`data.text_column` ('body') has no effect"),
    # The shape.
    (f"{TRAIN} data.block_size=65", "`data.block_size` (65) is longer than the model's `n_positions` (64)."),
    (f"{TRAIN} model.n_head=5", "`hidden_size` (`n_embd`, 32) is not divisible by `num_attention_heads` (`n_head`, 5)"),
    (f"{TRAIN} model.activation_function=gulu", "`activation_function` must be one of ['gelu_new',"),
    (f"{TRAIN} model.n_layers=6", "unknown field `n_layers`. Did you mean `n_layer`?"),
    (f"{TRAIN} sample.max_new_tokens=100", "`sample.prompt` and `sample.max_new_tokens` make 101 tokens"),
    # Token ids that the model does not know.
    (
        "train finetune.yaml tokenizer.name=mixed",
        "tokenizer has 512 ids, `init_from` (small) a `vocab_size` of 300.",
    ),
    ("evaluate mixed --data text.txt", "the model's `vocab_size` is 300. They do not belong together."),
    ("generate mixed The", "the model's `vocab_size` is 300. They do not belong together."),
    # The folder.
    ("train tiny.yaml seed=1", "`output_dir` (out/accelerate) holds another run: its `seed` is 0, this one's 1"),
    (f"{TRAIN} output_dir=notes", "`output_dir` (notes) holds files of something else."),
    (f"{TRAIN} output_dir=text.txt", "`output_dir` (text.txt) is a file. Name a folder."),
    ("train tiny.yaml output_dir=out/killed", "`output_dir` (out/killed) holds this run, unfinished. Add `--resume`"),
    # The recipe.
    ("train typo.yaml", "Key 'learning_rat' not in 'optim'. Did you mean 'learning_rate'?"),
    ("train list.yaml", "list.yaml is not a recipe: it must hold `key: value` lines."),
    ("train dmeo", "no recipe 'dmeo'"),
    ("config dmeo", "no recipe 'dmeo'"),
    ("config demo optim.name=adam", "`optim.name` must be one of ['adamw'], got 'adam'."),
    (f"{TRAIN} trian.max_steps=3", "Key 'trian' not in 'the recipe'. Did you mean 'train'?"),
    (f"{TRAIN} seed", "'seed' is not an override. Write `key.path=value`"),
    (f"{TRAIN} optim.schedule=cosin", "`optim.schedule` must be one of ['constant', 'cosine', 'linear'], got 'cosin'."),
    (f"{TRAIN} optim.warmup_steps=7", "`optim.warmup_steps` (7) is longer than `train.max_steps` (6)."),
    (
        f"{TRAIN} train.max_steps=null train.epochs=1 optim.warmup_steps=500",
        "`optim.warmup_steps` (500) is longer than the run (60 steps).",
    ),
    # The checkpoint.
    (f"{TRAIN} --resume nowhere", "no such checkpoint: nowhere. In out/new there are: none."),
    (
        "train tiny.yaml output_dir=out/killed --resume out/killed/checkpoint-9",
        "no such checkpoint: out/killed/checkpoint-9. In out/killed there are: checkpoint-3.",
    ),
    (
        "train tiny.yaml output_dir=out/killed --resume out/killed/checkpoint-3",
        "checkpoint-3/model.safetensors is damaged: it is not what was written.",
    ),
    (
        "train tiny.yaml output_dir=out/killed --resume out/trainer/checkpoint-3",
        "out/trainer/checkpoint-3 is a checkpoint of another run: `output_dir` is out/killed.",
    ),
    # The model.
    ("train finetune.yaml init_from=nowhere", "no tokenizer 'nowhere', neither as a folder nor on the Hub"),
    ("train finetune.yaml init_from=nowhere tokenizer.name=small", "`init_from`: "),
    ("train finetune.yaml model.n_layer=2", "`model.num_hidden_layers` has no effect: `init_from` ('small') fixes"),
    (
        "train finetune.yaml data.block_size=65",
        "(65) is longer than the `n_positions` of small (64). Lower it.",
    ),
    ("evaluate notes --data text.txt", "notes is no model folder: it has no config.json."),
    ("evaluate nowhere/at-all --data text.txt", "no model 'nowhere/at-all'"),
    ("evaluate damaged --data text.txt", "damaged/model.safetensors: Error while deserializing header"),
    ("evaluate unfitting --data text.txt", "no model 'unfitting': its config.json names no `model_type`."),
    ("generate unfitting The", "unfitting"),
    ("generate listed The", "no model 'listed': config.json must hold a JSON object."),
    ("evaluate listed --data text.txt", "no model 'listed': config.json must hold a JSON object."),
    ("generate notes The", "notes is no model folder"),
    ("verify notes", "notes is no model folder"),
    # The options.
    ("evaluate small --data missing.txt", "there is no file or folder 'missing.txt'."),
    ("evaluate small --data empty.txt", "holds no text: every document is empty."),
    ("evaluate small --data lines.jsonl --text-column body", "lines.jsonl has no column 'body', only ['text']."),
    ("evaluate small --data text.txt --text-column body", "`--text-column` ('body') has no effect"),
    ("evaluate small", "give `--data`, `--tasks` or both: there is nothing to measure the model on."),
    ("evaluate small --data text.txt --stride 65", "`--stride` must be between 1 and the context (64), got 65."),
    ("evaluate small --data text.txt --context 65", "`--context` (65) is longer than the model's (64). Lower it."),
    ("evaluate small --data text.txt --first-token bos", "`--first-token` must be one of ['lm-eval', 'text', 'skip']"),
    ("evaluate small --data text.txt --dtype int8", "`--dtype` must be one of ['auto', 'fp32', 'bf16', 'fp16']"),
    ("evaluate small --data text.txt --device tpu", "`--device` ('tpu') is not here"),
    ("evaluate small --data text.txt --limit 3", "`--limit` (3) has no effect without `--tasks`."),
    ("evaluate small --tasks typo.yaml", "'typo.yaml' is no task"),
    ("generate small The --max-new-tokens 64", "`max_new_tokens` (64) are together longer than the model's"),
    ("generate small The --max-new-tokens 0", "`max_new_tokens` must be at least 1, got 0."),
    ("generate small The --temperature -1", "`temperature` must be finite and at least 0, got -1.0."),
    ("generate small The --top-p 2", "`top_p` must be above 0 and at most 1, got 2.0."),
    ("generate small The\udcff", r"'The\udcff' is not UTF-8."),
    ("generate small The --num-beams 2 --top-k 5", "`top_k` has no effect: beam search (`num_beams` 2)"),
    ("generate small The --samples 2 --temperature 0", "`samples` (2): at `temperature` 0 each would be the same"),
    ("generate small The --compare tok_p=1", "`tok_p` is no setting. Did you mean `top_p`?"),
    ("generate small --prompts empty.txt", "empty.txt holds no prompt"),
    ("generate small --prompts missing.txt", "No such file or directory: 'missing.txt'"),
    ("explore small The --plot text.txt", "text.txt: the name must end in .png."),
    ("explore small The --html nowhere/x.html", "nowhere is no folder. Make it first."),
    ("explore small The --compare top_q=3", "`top_q` is no setting. Did you mean `top_p`?"),
    ("explore mixed The", "the model's `vocab_size` is 300. They do not belong together."),
    ("play small --set top_q=3", "`top_q` is no setting. Did you mean `top_p`?"),
    ("play notes", "notes is no model folder"),
    ("verify", "give a model or `--random SIZE`, one of them."),
    ("verify small --random small", "give a model or `--random SIZE`, one of them."),
    ("verify small --layers 1", "`--layers` has no effect without `--random`."),
    ("verify --random tiny", "`--random` must be one of ['small', 'medium', 'large', 'xl'], got 'tiny'."),
    ("verify --random small --layers 13", "`--layers` must be between 1 and 12 for 'small', got 13."),
    (f"{TRAIN} train.trackers=[tensorbord]", "`train.trackers` must be one of ['tensorboard', 'trackio', 'wandb',"),
    (f"{TRAIN} train.on_nonfinite=ignore", "`train.on_nonfinite` must be one of ['stop', 'skip'], got 'ignore'."),
    (f"{TRAIN} train.patience=3 train.save_every=0", "`train.patience` (3) keeps the best weights in a checkpoint"),
    ("compare out/accelerate", "give at least two runs to compare, got 1."),
    ("compare out/accelerate notes", "notes holds no run: it has no metrics.jsonl and run.yaml."),
    ("compare out/accelerate out/trainer --picture text.txt", "the picture must be a .png, got 'text.txt'."),
    ("tokenizer train notes --recipe tiny.yaml", "notes is not empty. Name a new folder."),
    ("tokenizer train tok --recipe finetune.yaml", "the recipe names a tokenizer that is trained already ('small')."),
]


@pytest.mark.parametrize(("words", "message"), BAD_INPUT, ids=[ascii(words) for words, _ in BAD_INPUT])
def test_bad_input_gets_one_clear_line_and_leaves_everything_as_it_was(bad_world, monkeypatch, words, message):
    monkeypatch.chdir(bad_world)
    before = contents(bad_world)

    said = hfgpt(*words.split(" "))

    assert said.code == 2, said
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert message in said.err
    assert contents(bad_world) == before


MISUSE = [
    ("train", "missing argument 'RECIPE'. See `hfgpt train --help`."),
    ("trian demo", "no such command 'trian'. Did you mean 'train'? See `hfgpt --help`."),
    ("tokenizer trian", "no such command 'trian'. Did you mean 'train'? See `hfgpt tokenizer --help`."),
    ("train demo --fast", "no such option: --fast. See `hfgpt train --help`."),
    ("train demo --resum", "no such option: --resum. Did you mean --resume? See `hfgpt train --help`."),
    ("train demo --train.max_steps=3", "Values of a recipe have no dashes: `train.max_steps=VALUE`."),
    ("tokenizer train", "missing argument 'folder'."),
    ("evaluate small --data a.txt --batch-size many", "invalid value for '--batch-size': "),
    ("evaluate small --data a.txt --batch-size 0", "invalid value for '--batch-size': "),
    ("evaluate small large --data a.txt", "got unexpected extra argument"),
    ("generate small", "give a PROMPT or `--prompts FILE`, one of them."),
    ("explore small", "missing argument"),
    ("generate small The --seed", "option '--seed' requires an argument."),
]


@pytest.mark.parametrize(("words", "message"), MISUSE, ids=[words for words, _ in MISUSE])
def test_a_wrong_command_line_gets_one_line_and_exit_code_2(words, message):
    said = hfgpt(*words.split())

    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert message in said.err


def test_a_missing_package_is_named_with_the_extra_that_brings_it():
    def missing(name):
        return describe_missing(ModuleNotFoundError(f"No module named {name!r}", name=name))

    assert missing("gguf") == needs("this", "gguf")
    assert missing("google_crc32c") == needs("this", "google-crc32c")
    assert missing("lm_eval.tasks") == needs("this", "lm-eval")
    assert missing("pytest") is None
    assert missing("hfgpt.nowhere") is None  # that is no fault of the user's: the traceback is shown


def test_too_little_memory_is_said_in_one_line(world):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)

    assert describe(caught.value).startswith("out of memory. Lower the batch, the rows or the model.")
    assert describe(RuntimeError("a bug")) is None
    said = hfgpt("train", "tiny.yaml", "output_dir=out/new", "model.n_embd=4000000000", "model.n_head=1")
    assert said.code == 1
    assert said.err.startswith("error: out of memory.")
    assert said.err.count("\n") == 1


# --- terminals, pipes and shells


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
