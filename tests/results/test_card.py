"""Cards: no number without a measurement, none typed again, nothing of this machine; and what stands in them works."""

import ast
import copy
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard, parse_eval_result_entries

from hfgpt.cli import main
from hfgpt.config.loading import load_config
from hfgpt.config.recipes import package_file
from hfgpt.config.schema import OptimConfig
from hfgpt.data.tokenizer import bytes_of_ids, encode_ids, load_tokenizer
from hfgpt.results.card import MARKER, TEMPLATE, compare_card, render_card, render_evaluation, write_card
from hfgpt.results.records import training_speed
from hfgpt.training.finish import bits_per_byte, describe_origin, progress
from hfgpt.training.run import origin
from hfgpt.training.train import train

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "cards").glob("*.json"))
TEXT_NAME = "diary-of-alice.txt"


def hfgpt(*words):
    """Exit code of the command line, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hfgpt", *map(str, words)])
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")
        try:
            main()
        except SystemExit as stop:
            return stop.code or 0
    return 0


@pytest.fixture(scope="module")
def run(tmp_path_factory, lines):
    """The folder of a finished run of a few steps."""
    folder = tmp_path_factory.mktemp("alice")
    (folder / TEXT_NAME).write_text("\n".join(lines), encoding="utf-8")
    recipe = {
        "output_dir": str(folder / "run"),
        "model": {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2},
        "tokenizer": {"vocab_size": 320},
        "data": {"files": str(folder / TEXT_NAME), "block_size": 32},
        "optim": {"warmup_steps": 1},
        "train": {"max_steps": 4, "batch_size": 4, "eval_every": 1, "eval_rows": 4, "save_every": 0},
        "sample": {"prompt": "The", "max_new_tokens": 8},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    AcceleratorState._reset_state(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        train(load_config(folder / "recipe.yaml"))
    yield folder / "run"
    AcceleratorState._reset_state(True)


@pytest.fixture
def measured(run):
    """What its results.json holds; a test may change it."""
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


@pytest.fixture
def copied(run, tmp_path):
    """Its results and its card in a folder that a test may change."""
    for name in ("results.json", "README.md"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    return tmp_path


def render(results):
    return render_card(package_file(TEMPLATE).read_text(encoding="utf-8"), results)


def without(results, *path):
    """A copy of it that lacks one key."""
    results = copy.deepcopy(results)
    section = results
    for name in path[:-1]:
        section = section[name]
    del section[path[-1]]
    return results


# --- the numbers

MEASURED = {
    "val_loss": ".4f",
    "train_loss": ".4f",
    "val_perplexity": ",.2f",
    "bits_per_byte": ".4f",
    "bigram_perplexity": ",.2f",
    "unigram_perplexity": ",.2f",
    "tokens_per_second": ",.0f",
    "elapsed_seconds": ".0f",
    "peak_memory_bytes": None,  # shown in GB
    "step": ",",
    "tokens": ",",
    "parameters": None,  # shown as 20.6k
    "train_tokens": ",",
    "validation_tokens": ",",
}
"""What a run measures, and how the card shows it."""


def test_training_leaves_a_card_that_says_what_results_json_holds(run, measured):
    assert (run / "README.md").read_text(encoding="utf-8") == render(measured)
    assert compare_card(run) is None


@pytest.mark.parametrize("name", MEASURED)
def test_every_number_is_read_and_none_is_repeated_by_hand(measured, name):
    card, changed = render(measured), render({**measured, name: 7777 + 2 * measured[name]})

    assert card != changed
    shown = format(measured[name], MEASURED[name] or "")
    if MEASURED[name] and len(shown) > 3:  # a shorter number stands there for something else as well
        number = rf"(?<![\d.,]){re.escape(shown)}(?![\d,]|\.\d)"
        assert re.search(number, card)
        assert not re.search(number, changed)


@pytest.mark.parametrize("name", [*MEASURED, "run", "samples", "card", "verified", "environment"])
def test_a_card_with_a_missing_number_does_not_render(measured, name):
    with pytest.raises(ValueError, match=rf"does not hold all that the card shows \(.*{name}"):
        render(without(measured, name))


@pytest.mark.parametrize("path", [("run", "optim", "learning_rate"), ("run", "data", "train_sha256"), ("run", "seed")])
def test_a_card_with_a_missing_setting_does_not_render(measured, path):
    with pytest.raises(ValueError, match=f"does not hold all that the card shows .*{path[-1]}"):
        render(without(measured, *path))


@pytest.mark.parametrize("value", [None, "73.0", math.nan, math.inf, True])
def test_what_is_no_number_is_not_shown_as_one(measured, value):
    with pytest.raises(ValueError, match="where the card shows a number"):
        render({**measured, "val_loss": value})


def test_what_could_not_be_measured_is_not_shown(measured):
    assert "not measured: the tokenizer is not byte-level" in render({**measured, "bits_per_byte": None})
    assert "tokens per second" in render(measured)
    assert "tokens per second" not in render({**measured, "tokens_per_second": None})


def test_what_nobody_can_measure_of_a_stream_is_said_to_be_so(measured):
    measured["run"]["data"] |= {"streaming": True, "train_sha256": None}
    measured["run"]["train"]["epochs"] = None
    for name in ("train_tokens", "bigram_perplexity", "unigram_perplexity"):
        del measured[name]

    card = render(measured)

    assert card.count("not measured of a stream") == 2
    assert "| token ids of the training rows | not taken of a stream |" in card
    assert "read as it came, not kept, and" in card


def test_a_model_worse_than_a_bigram_model_says_so(measured):
    sentence = "no better than a bigram model"

    assert sentence in render({**measured, "val_perplexity": 80.0, "bigram_perplexity": 79.9})
    assert sentence not in render({**measured, "val_perplexity": 79.8, "bigram_perplexity": 79.9})


def test_bits_per_byte_are_the_loss_spread_over_the_bytes_of_the_text(tokenizer):
    text = "The file object größer 한국어 🙂\n"
    (ids,) = encode_ids(tokenizer, [text])
    targets = np.array([*ids, tokenizer.eos_token_id])

    bits = bits_per_byte(2.0, targets, bytes_of_ids(tokenizer))

    assert bits == pytest.approx(2.0 * (len(ids) + 1) / math.log(2) / len(text.encode()))  # the end is no text
    assert bits_per_byte(2.0, targets, None) is None
    assert bits_per_byte(2.0, np.array([tokenizer.eos_token_id]), bytes_of_ids(tokenizer)) is None


def test_the_run_measures_bits_per_byte_of_its_held_out_text(run, measured, lines):
    tokenizer, text = load_tokenizer(str(run)), "\n".join(lines)
    held_out = text[len(text) - round(0.1 * len(text)) :]
    (ids,) = encode_ids(tokenizer, [held_out])
    scored = ids[1 : 1 + 32 * ((len(ids) - 1) // 32)]

    num_bytes = len(tokenizer.decode(scored).encode())

    expected = measured["val_loss"] * len(scored) / math.log(2) / num_bytes
    assert measured["bits_per_byte"] == pytest.approx(expected)


def test_the_speed_is_that_of_the_steps_alone():
    lines = [
        {"step": 1, "tokens": 100, "tokens_per_second": 100.0},
        {"step": 1, "tokens": 100, "val_loss": 3.0},
        {"step": 2, "tokens": 400, "tokens_per_second": 300.0},
    ]

    assert training_speed(lines) == 400 / 2.0
    assert training_speed(lines[1:2]) is None


# --- what the Hub reads


def test_the_hub_reads_metadata_and_results(measured, tmp_path):
    measured["card"] = {"license": "cc-by-4.0", "language": "ko", "repo_id": "alice/gpt"}
    measured["run"]["data"] |= {"source": None, "hub_id": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}
    measured["run"] |= {"starts_from": "hub", "base_model": "openai-community/gpt2"}

    (tmp_path / "README.md").write_text(render(measured), encoding="utf-8")

    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.language, data.library_name) == ("cc-by-4.0", "ko", "transformers")
    assert (data.pipeline_tag, data.datasets) == ("text-generation", ["Salesforce/wikitext"])
    assert (data.base_model, data.model_name) == ("openai-community/gpt2", "gpt")
    perplexity, loss = data.eval_results
    assert (perplexity.task_type, perplexity.metric_type) == ("text-generation", "perplexity")
    assert (perplexity.dataset_type, perplexity.dataset_config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert perplexity.dataset_split == "train (held-out part)"
    assert perplexity.metric_value == pytest.approx(measured["val_perplexity"], abs=1e-4)
    assert loss.metric_value == pytest.approx(measured["val_loss"], abs=1e-4)


def test_the_newer_format_says_the_same_of_a_data_set_on_the_hub(measured, copied):
    measured["run"]["data"] |= {"source": None, "hub_id": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}
    (copied / "results.json").write_text(json.dumps(measured))

    write_card(copied)

    (entry,) = parse_eval_result_entries(yaml.safe_load((copied / ".eval_results" / "perplexity.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert entry.value == pytest.approx(measured["val_perplexity"], abs=1e-4)
    assert compare_card(copied) is None
    (copied / ".eval_results" / "perplexity.yaml").write_text("- value: 1\n")
    assert "perplexity.yaml, line 1" in compare_card(copied)


def test_text_that_is_not_on_the_hub_has_no_results_there(measured, run):
    assert render_evaluation(measured) is None
    assert not (run / ".eval_results").exists()
    assert ModelCard.load(run / "README.md").data.datasets is None


def test_no_license_is_given_that_nobody_chose(measured):
    card = ModelCard(render(measured))

    assert card.data.license is None
    assert "No license was chosen for these weights" in card.text


def test_a_card_names_nothing_of_the_machine_and_no_file_of_the_users(run):
    for name in ("README.md", "results.json"):
        text = (run / name).read_text(encoding="utf-8")
        for secret in (str(run.parent), run.parent.name, TEXT_NAME, "alice", str(Path.home())):
            assert secret not in text, name


def test_a_model_on_this_machine_is_not_named_and_one_on_the_hub_is(tmp_path):
    def described(name):
        return describe_origin(origin(name), name, "base_model")

    assert described(str(tmp_path)) == {"starts_from": "folder", "base_model": None}
    assert described("user/gpt") == {"starts_from": "hub", "base_model": "user/gpt"}
    assert described(None) == {"starts_from": "nothing", "base_model": None}


@pytest.mark.parametrize("kind", ["folder", "hub"])
def test_a_model_trained_further_owes_to_its_base(measured, kind):
    base = "openai-community/gpt2" if kind == "hub" else None
    measured["run"] |= {"starts_from": kind, "base_model": base}

    card = render(measured)

    assert "that of the model that it started from applies as well" in card
    assert ("trained further from [openai-community/gpt2]" in card) == (kind == "hub")


# --- what stands in it


def code(card, language):
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE)
    return block


def test_its_python_runs_where_hfgpt_is_not_installed(run):
    program = code((run / "README.md").read_text(encoding="utf-8"), "python")

    ran = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.modules['hfgpt'] = None\n{program}"],
        cwd=run,
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("The")
    assert len(ran.stdout) > len("The\n")


def test_its_commands_run(run, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in run.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(folder)

    commands = code((folder / "README.md").read_text(encoding="utf-8"), "bash").splitlines()

    assert [hfgpt(*command.split()[1:]) for command in commands] == [0, 0]
    assert (folder / "model.gguf").stat().st_size > 0
    assert (folder / "plain-gpt2" / "model.safetensors").is_file()


@pytest.mark.parametrize("prompt", ['say "no"\\', "two\nlines ```", "한국어 🙂 \u2028", "{{ 1/0 }} <b>"])
def test_any_prompt_and_any_sample_stay_what_they_are(measured, prompt):
    measured["run"]["sample"]["prompt"] = prompt
    measured["samples"] = [{"step": 1, "text": f"{prompt}\n```\n# Not a heading"}]

    card = render(measured)

    program = ast.parse(code(card, "python"))
    strings = {node.value for node in ast.walk(program) if isinstance(node, ast.Constant)}
    assert prompt in strings
    assert f"text\n{prompt}\n```\n# Not a heading\n````\n" in card  # its fence is longer


def test_a_greedy_sample_is_shown_as_greedy(measured):
    measured["run"]["sample"]["temperature"] = 0.0

    assert "do_sample=False)" in code(render(measured), "python")


def test_samples_show_how_it_learnt():
    assert progress([]) == []
    assert progress([(0, "untrained"), (4, "end")]) == [(4, "end")]
    assert progress([(step, "text") for step in (0, 1, 2, 3, 4, 5)]) == [(1, "text"), (3, "text"), (5, "text")]


def test_what_is_verified_is_shown(copied, run, measured):
    write_card(run, verified=None)
    assert hfgpt("card", run, "--verify") == 0

    card = (run / "README.md").read_text(encoding="utf-8")
    found = json.loads((run / "results.json").read_text())["verified"]
    assert found["passed"]
    assert f"max |Δlogit| {found['max_abs_diff']:.2e} ({found['tolerance']:.2e} allowed)" in card
    assert "the same model" in card
    assert "NOT the same model" in render({**measured, "verified": {**found, "passed": False}})
    for name in ("results.json", "README.md"):  # for the other tests
        (run / name).write_bytes((copied / name).read_bytes())


# --- the command


def test_check_finds_a_number_that_was_typed_again_and_card_puts_it_right(copied, capsys):
    right = (copied / "README.md").read_text(encoding="utf-8")
    perplexity = re.search(r"perplexity per token \| ([\d.,]+)", right)[1]
    (copied / "README.md").write_text(right.replace(f"token | {perplexity}", "token | 12.34"), encoding="utf-8")

    assert hfgpt("card", copied, "--check") == 1
    said = capsys.readouterr()
    line = 1 + right[: right.index("perplexity per token |")].count("\n")
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert f"README.md, line {line}: it says '| perplexity per token | 12.34 | |', results.json gives" in said.err
    assert perplexity in said.err

    assert hfgpt("card", copied) == 0
    assert capsys.readouterr().out == f"{copied / 'README.md'}\n"
    assert (copied / "README.md").read_text(encoding="utf-8") == right
    assert hfgpt("card", copied, "--check") == 0


@pytest.mark.parametrize("change", [lambda text: text + "More.\n", lambda text: text[:-1], lambda text: text[:2000]])
def test_check_finds_what_was_added_or_cut(copied, change):
    (copied / "README.md").write_text(change((copied / "README.md").read_text(encoding="utf-8")), encoding="utf-8")

    assert compare_card(copied) is not None
    assert hfgpt("card", copied, "--check") == 1


def test_words_that_cannot_be_measured_are_given_and_stay(copied):
    assert hfgpt("card", copied, "--license", "mit", "--language", "en", "--repo-id", "alice/gpt") == 0
    assert hfgpt("card", copied) == 0

    card = ModelCard.load(copied / "README.md")
    assert (card.data.license, card.data.language, card.data.model_name) == ("mit", "en", "gpt")
    assert 'name = "alice/gpt"\n' in code(card.text, "python")
    assert "License of the weights: mit" in card.text
    assert hfgpt("card", copied, "--check") == 0

    assert hfgpt("card", copied, "--license", "") == 0
    assert ModelCard.load(copied / "README.md").data.license is None


BAD = [
    (["--license", "MIT License"], "`--license` must be the Hub's name of a license"),
    (["--language", "English"], "`--language` must be a code of ISO 639"),
    (["--repo-id", "gpt"], "`--repo-id` must be the name of a repository"),
    (["--check", "--license", "mit"], "`--check` writes nothing: give it alone."),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=lambda value: str(value))
def test_bad_words_change_nothing(copied, capsys, words, message):
    before = {path: path.read_bytes() for path in copied.iterdir()}

    assert hfgpt("card", copied, *words) == 2

    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in copied.iterdir()} == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no results.json: a card says what was measured."),
        ("{", "results.json is not JSON"),
        ("[]", "it must be a JSON object"),
        ('{"step": 3}', "results.json does not hold all that the card shows"),
    ],
)
def test_without_results_there_is_no_card(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)

    assert hfgpt("card", tmp_path) == 2

    assert message in capsys.readouterr().err
    assert not (tmp_path / "README.md").exists()


def test_a_readme_of_someones_own_is_kept(copied, capsys):
    (copied / "README.md").write_text("# My notes\n")

    assert hfgpt("card", copied, "--license", "mit") == 2

    assert "was not written by `hfgpt card`. Move it away first." in capsys.readouterr().err
    assert (copied / "README.md").read_text() == "# My notes\n"
    assert json.loads((copied / "results.json").read_text())["card"]["license"] is None


def test_a_run_leaves_a_readme_of_someones_own_alone(run, tmp_path):
    recipe = load_config(run / "run.yaml", [f"output_dir={tmp_path / 'out'}", "train.max_steps=1"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.yaml").write_bytes((run / "run.yaml").read_bytes())
    text = (run / "run.yaml").read_text().replace("max_steps: 4", "max_steps: 1")
    (tmp_path / "out" / "run.yaml").write_text(text)
    (tmp_path / "out" / "README.md").write_text("# My notes\n")
    AcceleratorState._reset_state(True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", run.parent / "cache")
        train(recipe, resume=True)

    assert (tmp_path / "out" / "results.json").is_file()
    assert (tmp_path / "out" / "README.md").read_text() == "# My notes\n"


# --- the cards of this repository


def test_there_is_a_card_of_the_demo():
    assert "demo" in {path.stem for path in COMMITTED}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_cards_match_their_numbers(path):
    assert compare_card(path) is None
    assert MARKER in path.with_suffix(".md").read_text(encoding="utf-8")
    assert path.with_suffix(".png").is_file()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_cards_are_of_the_recipes_as_they_are(path):
    recipe, run = load_config(path.stem), json.loads(path.read_text(encoding="utf-8"))["run"]

    assert run["seed"] == recipe.seed
    # What became an option since then, and is not in its record, has its default in the recipe, too.
    assert run["optim"] == {name: json.loads(json.dumps(recipe.optim.__dict__))[name] for name in run["optim"]}
    newer = recipe.optim.__dict__.keys() - run["optim"]
    assert all(getattr(recipe.optim, name) == getattr(OptimConfig, name) for name in newer)
    assert run["sample"] == recipe.sample.__dict__
    assert run["data"]["block_size"] == recipe.data.block_size
    shown = recipe.model.keys() & run["model"].keys()
    assert len(shown) >= 4
    assert {name: run["model"][name] for name in shown} == {name: recipe.model[name] for name in shown}


def test_the_template_is_short():
    assert len(package_file(TEMPLATE).read_text(encoding="utf-8").splitlines()) < 80
