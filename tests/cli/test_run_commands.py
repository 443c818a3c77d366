"""Recipes, runs, tokenizers and texts by command: what is done, printed and refused."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import odd_tokenizers as odd
import pytest
import torch
from commands import LOOPS, contents, hfgpt, unfinish

from hfgpt.cli import describe, join_resume
from hfgpt.config.loading import flatten, load_config
from hfgpt.data.tokenizer import load_tokenizer
from hfgpt.evaluation.report import measure
from hfgpt.system.doctor import Finding


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
    assert "% of peak" not in trained.err  # a CPU has no peak that holds
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


@pytest.mark.parametrize("words", ["data prepare tiny.yaml", "train tiny.yaml output_dir=out/new", "evaluate"])
def test_every_command_says_which_files_of_a_folder_are_no_text(world, words):
    for name in ("text.txt", "more.txt", ".git/a.txt", "._text.txt", "README.md", "empty.md", "a.png"):
        Path("corpus", name).parent.mkdir(parents=True, exist_ok=True)
        Path("corpus", name).write_bytes(b"" if "empty" in name else Path("text.txt").read_bytes())

    folder = ["out/accelerate", "--data", "corpus"] if words == "evaluate" else ["data.files=corpus"]
    said = hfgpt(*words.split(), *folder)

    assert said.code == 0, said.err
    [line] = [line for line in said.err.splitlines() if line.startswith("left out of the text: ")]
    for part in ("5 files: ", "2 hidden (._text.txt, .git/a.txt)", "(README.md)", "1 of another kind", "1 empty"):
        assert part in line


def test_a_tilde_is_the_home_folder_wherever_a_path_stands(world, monkeypatch):
    monkeypatch.setenv("HOME", str(world))
    small = "train.max_steps=2 train.eval_rows=2 sample.max_new_tokens=3 optim.warmup_steps=1".split()

    for words in (
        ["train", "~/tiny.yaml", "output_dir=~/out/new", "data.files=~/text.txt", *small],
        ["tokenizer", "train", "~/tokenizer", "data.files=~/text.txt", "tokenizer.vocab_size=300"],
        ["evaluate", "~/out/new", "--data=~/text.txt", "--tokenizer=~/out/new"],
        ["compare", "~/out/new", "~/out/accelerate", "--picture=~/curves.png"],
        ["generate", "~/out/new", "~/The", "--max-new-tokens=2"],
        ["convert", "~/out/new", "~/converted", "--to=gpt2"],
        ["config", "~/tiny.yaml"],
    ):
        said = hfgpt(*words)
        assert said.code == 0, said.err

    assert {"tokenizer", "curves.png", "converted"} < {path.name for path in world.iterdir()}
    assert not Path("~").exists()


def test_the_files_of_ones_own_replace_the_text_of_a_recipe(world):
    said = hfgpt("data", "prepare", "demo", "data.files=text.txt", "tokenizer.vocab_size=300", "--json")

    assert said.code == 0, said.err
    assert json.loads(said.out)["train"]["documents"] == 1


TRAIN = "train tiny.yaml output_dir=out/new"


def test_too_little_memory_is_said_in_one_line(world):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)

    assert describe(caught.value).startswith("out of memory. Lower the batch, the rows or the model.")
    assert describe(RuntimeError("a bug")) is None
    said = hfgpt("train", "tiny.yaml", "output_dir=out/new", "model.n_embd=4000000000", "model.n_head=1")
    assert said.code == 1
    assert said.err.startswith("error: out of memory.")
    assert said.err.count("\n") == 1


def test_data_prepare_says_how_much_the_tokenizer_does_not_know(world):
    odd.words(["the", "of"]).save_pretrained("words")
    words = ["data", "prepare", "tiny.yaml", "tokenizer.name=words", "tokenizer.vocab_size=4096"]

    said, known = hfgpt(*words), hfgpt("data", "prepare", "tiny.yaml")

    assert "of the tokens are unknown to the tokenizer: a loss says little" in said.err.partition("warning: ")[2]
    assert said.out.count("of the tokens are unknown to the tokenizer") == 2
    assert known.out.count("0.0% of the tokens are unknown to the tokenizer") == 2
    assert "warning" not in known.err


BAD_INPUT = [
    # The text.
    (f"{TRAIN} data.files=missing.txt", "no file or folder 'missing.txt'"),
    (f"{TRAIN} data.files=null", "`data.source` or `data.files`", "None and None", "`data.source=pydoc`"),
    (f"{TRAIN} data.files=emptied", "folder emptied", ".txt"),
    (f"{TRAIN} data.files=text.pdf", "text.pdf", "'.pdf'", ".txt, .md, .jsonl"),
    (f"{TRAIN} data.files=latin.txt", "latin.txt", "UTF-8", "0xe9 at offset 3", "iconv -f windows-1252"),
    (f"{TRAIN} data.files=empty.txt", "empty.txt is empty: there is no text to read."),
    (f"{TRAIN} data.files=short.txt", "training split", "one block of 33", "lower `data.block_size` (32)"),
    (f"{TRAIN} data.files=[text.txt,short.txt]", "validation split", "one block of 33", "give more text"),
    (
        f"{TRAIN} data.files=lines.jsonl data.text_column=body",
        *("lines.jsonl", "'body'", "['text']", "Set `data.text_column`"),
    ),
    (f"{TRAIN} data.text_column=body", "`data.text_column` ('body') has no effect"),
    # The shape.
    (f"{TRAIN} data.block_size=65", "`data.block_size` (65)", "`n_positions` (64)", "Lower the one"),
    (f"{TRAIN} model.n_head=5", "(`n_embd`, 32)", "(`n_head`, 5)"),
    (f"{TRAIN} model.activation_function=gulu", "`activation_function`", "'gulu'", "one of ['gelu_new',"),
    (f"{TRAIN} model.n_layers=6", "`model.n_layers`", "Did you mean `model.n_layer=6`?"),
    (
        f"{TRAIN} sample.max_new_tokens=100",
        *("`sample.max_new_tokens`", "101 tokens", "`n_positions` are 64", "Shorten the sample"),
    ),
    # Token ids that the model does not know.
    (
        "train finetune.yaml tokenizer.name=mixed",
        *("the tokenizer mixed makes the id 511", "`vocab_size` is 300", "Leave `tokenizer.name` out"),
    ),
    # The folder.
    ("train tiny.yaml seed=1", "`output_dir` (out/accelerate)", "`seed` is 0, this one's 1", "Name another folder"),
    (f"{TRAIN} output_dir=notes", "`output_dir` (notes)", "Name an empty folder"),
    (f"{TRAIN} output_dir=text.txt", "`output_dir` (text.txt) is a file", "Name a folder"),
    ("train tiny.yaml output_dir=out/killed", "`output_dir` (out/killed)", "unfinished", "Add `--resume`"),
    # The recipe.
    ("train typo.yaml", "typo.yaml: unknown key `optim.learning_rat`", "`optim: {learning_rate: 0.01}`"),
    ("train list.yaml", "list.yaml is not a recipe", "`key: value` lines"),
    ("train dmeo", "no recipe 'dmeo'", "`demo`"),
    ("config dmeo", "no recipe 'dmeo'", "`demo`"),
    ("config demo optim.name=adam", "`optim.name`", "'adam'", "one of ['adamw', 'muon']"),
    (f"{TRAIN} trian.max_steps=3", "`trian.max_steps`", "Did you mean `train.max_steps=3`?"),
    (f"{TRAIN} seed", "'seed' is not an override", "Did you mean `seed=VALUE`?"),
    (f"{TRAIN} optim.schedule=cosin", "`optim.schedule`", "'cosin'", "one of ['constant', 'cosine', 'linear', 'wsd']"),
    (f"{TRAIN} optim.warmup_steps=7", "`optim.warmup_steps` (7)", "`train.max_steps` (6)", "lower the one"),
    (
        f"{TRAIN} train.trackers=[tensorbord]",
        "`train.trackers`",
        "got 'tensorbord'",
        "one of ['tensorboard', 'trackio',",
    ),
    (f"{TRAIN} train.on_nonfinite=ignore", "`train.on_nonfinite`", "'ignore'", "one of ['stop', 'skip']"),
    (
        f"{TRAIN} train.patience=3 train.save_every=0",
        *("`train.patience` (3)", "`train.save_every` is 0", "leave `train.patience` out"),
    ),
    # The checkpoint.
    (f"{TRAIN} --resume nowhere", "no such checkpoint: nowhere", "out/new", "none"),
    (
        "train tiny.yaml output_dir=out/killed --resume out/killed/checkpoint-9",
        *("no such checkpoint: out/killed/checkpoint-9", "In out/killed", "checkpoint-3"),
    ),
    (
        "train tiny.yaml output_dir=out/killed --resume out/killed/checkpoint-3",
        "checkpoint-3/model.safetensors is damaged",
    ),
    (
        "train tiny.yaml output_dir=out/killed --resume out/trainer/checkpoint-3",
        *("out/trainer/checkpoint-3", "another run", "`output_dir` is out/killed"),
    ),
    # The model to go on from.
    ("train finetune.yaml init_from=nowhere", "no tokenizer 'nowhere'"),
    ("train finetune.yaml init_from=nowhere tokenizer.name=small", "`init_from`: ", "no model 'nowhere'"),
    (
        "train finetune.yaml model.n_layer=2",
        *("`model.num_hidden_layers` has no effect", "`init_from` ('small')", "Only resid_pdrop"),
    ),
    ("train finetune.yaml data.block_size=65", "(65)", "`n_positions` of small (64)", "Lower it"),
    # Other commands.
    ("compare out/accelerate", "at least two runs", "got 1"),
    ("compare out/accelerate notes", "notes holds no run", "metrics.jsonl"),
    ("compare out/accelerate out/trainer --picture text.txt", "'text.txt'", "must be a .png"),
    ("tokenizer train notes --recipe tiny.yaml", "notes is not empty", "Name a new folder"),
    ("tokenizer train tok --recipe finetune.yaml", "trained already ('small')"),
]


@pytest.mark.parametrize("case", BAD_INPUT, ids=lambda case: ascii(case[0]))
def test_bad_input_gets_one_clear_line_and_leaves_everything_as_it_was(refuse, case):
    refuse(*case)


@pytest.mark.parametrize("command", [["train", "tiny.yaml"], ["evaluate", "out/accelerate", "--data", "text.txt"]])
def test_an_allocator_that_there_is_not_is_refused(finished, command):
    refused = hfgpt(*command, "--allocator", "kepp")

    assert (refused.code, refused.out) == (2, "")
    assert "`--allocator` must be one of ['default', 'keep'], got 'kepp'." in refused.err
