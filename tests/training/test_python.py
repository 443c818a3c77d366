"""Training, measuring and comparing from Python, as in a notebook."""

import base64
import subprocess
import sys
from pathlib import Path

import pytest

import hfgpt
from hfgpt.config.loading import load_config
from hfgpt.results.notebook import RunResults
from hfgpt.results.records import read_results

SMALL = {
    "data": {"source": None, "files": "text.txt", "block_size": 32},
    "model": {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2},
    "tokenizer.vocab_size": 300,
    "optim.warmup_steps": 1,
    "train": {"max_steps": 3, "batch_size": 4, "eval_every": 2, "save_every": 0, "eval_rows": 4},
    "sample": {"prompt": "The: <b>", "max_new_tokens": 4},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, lines):
    """A folder with a text and two runs, and what `hfgpt.train` returned for them."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runs = [hfgpt.train("demo", {**SMALL, "output_dir": f"out/{seed}", "seed": seed}) for seed in (0, 1)]
    return folder, runs


@pytest.fixture
def runs(world, monkeypatch):
    folder, runs = world
    monkeypatch.chdir(folder)
    return runs


def test_a_recipe_by_name_trains_with_values_from_python(runs):
    first, second = runs

    assert first == read_results(Path("out/0/results.json"))
    assert (first.folder, first.was_finished, first["last_step"]) == (Path("out/0"), False, 3)
    assert first["val_loss"] != second["val_loss"]
    assert load_config("out/0/run.yaml").sample.prompt == "The: <b>"


def test_a_run_that_is_finished_gives_its_results_again(runs):
    again = hfgpt.train("demo", {**SMALL, "output_dir": "out/0", "seed": 0}, resume=True)

    assert again == runs[0]
    assert again.was_finished


def test_a_config_trains_as_well_and_has_its_values_already(runs):
    config = load_config("out/0/run.yaml")

    assert hfgpt.train(config) == runs[0]
    with pytest.raises(ValueError, match="a config has its values already"):
        hfgpt.train(config, {"seed": 3})


def test_values_from_python_are_those_of_the_command_line():
    typed = load_config("demo", ["train.max_steps=700", "optim.betas=[0.9,0.99]", "sample.prompt=a: ${b} ???"])

    for overrides in (
        {"train.max_steps": 700, "optim.betas": (0.9, 0.99), "sample.prompt": "a: ${b} ???"},
        {"train": {"max_steps": 700}, "optim": {"betas": [0.9, 0.99]}, "sample": {"prompt": "a: ${b} ???"}},
    ):
        assert load_config("demo", overrides) == typed
    named = load_config("demo", {"data.source": None, "data.files": [Path("글 모음.txt")], "train.max_steps": 1e3})
    assert (named.data.files, named.train.max_steps) == (["글 모음.txt"], 1000)
    assert load_config("demo", "seed=3").seed == 3


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        ({"optim.lr": 1e-3}, "unknown key `optim.lr`. Did you mean `'optim.learning_rate': 0.001`?"),
        ({"optim": {"lr": 1e-3}}, "Did you mean `'optim.learning_rate': 0.001`?"),
        ({"max_steps": 5}, "Did you mean `'train.max_steps': 5`?"),
        ({"prompt": "a b"}, "Did you mean `'sample.prompt': 'a b'`?"),
        ({"train": 5}, "`train` must hold `key: value` lines, got 5."),
        (["lr=3"], "Did you mean `optim.learning_rate=3`?"),
        ("lr=3", "Did you mean `optim.learning_rate=3`?"),
    ],
)
def test_a_wrong_key_is_answered_as_it_is_to_be_written(overrides, answer):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at
        hfgpt.train("demo", overrides)

    assert answer in str(caught.value)


def test_a_notebook_shows_numbers_curves_and_a_text(runs):
    shown = runs[0]._repr_html_()

    assert f"{runs[0]['val_loss']:.4f}" in shown
    assert f"{runs[0]['val_perplexity']:,.1f}" in shown
    assert base64.b64encode(Path("out/0/loss.png").read_bytes()).decode() in shown
    assert "The: &lt;b&gt;" in shown
    assert "<b>" not in shown


def test_a_shell_prints_the_same_as_lines(runs):
    printed = repr(runs[0])

    assert f"{runs[0]['val_loss']:.4f}" in printed
    assert printed.splitlines()[0].split() == ["folder", "out/0"]
    assert runs[0]["samples"][-1]["text"] in printed
    assert len(printed) < 2000


def test_results_without_samples_baselines_or_a_picture_are_shown_as_far_as_they_go(tmp_path):
    results = RunResults({"val_loss": 2.5, "samples": [], "bits_per_byte": None}, tmp_path)

    assert "2.5000" in results._repr_html_()
    assert "<img" not in results._repr_html_()
    assert "bits" not in repr(results)
    assert repr(RunResults({}, tmp_path))  # of another process than the main one


def test_a_model_is_measured_and_shown(runs):
    report = hfgpt.evaluate("out/0", "text.txt")

    loss = f"{report.text.measurements[0].loss:.4f}"
    assert loss in repr(report)
    assert loss in report._repr_html_()


def test_runs_are_compared_and_shown(runs):
    comparison = hfgpt.compare(["out/0", Path("out/1")])

    assert [run["val_loss"] for run in comparison["runs"]] == [run["val_loss"] for run in runs]
    assert f"{runs[1]['val_loss']:.4f}" in repr(comparison)
    assert "warning: `seed` differs" in repr(comparison)
    assert base64.b64encode(b"\x89PNG\r\n").decode()[:6] in comparison._repr_html_()
    assert not list(Path().glob("*.png"))


def test_names_of_the_package_are_imported_when_they_are_used():
    program = "import hfgpt, sys; assert 'torch' not in sys.modules; names = [getattr(hfgpt, n) for n in hfgpt.__all__]"

    subprocess.run([sys.executable, "-c", program], check=True)
    assert {*hfgpt.PUBLIC_NAMES} == {*hfgpt.__all__} - {"__version__"}
