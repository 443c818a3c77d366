"""Trackers hear, through accelerate, what metrics.jsonl holds, and nothing that is nobody's business."""

import json
import os
import re
import sqlite3
import sys

import pytest
from runs import LOOPS, metrics, run, run_until_killed, training_lines

from hfgpt.config.loading import load_config
from hfgpt.config.schema import DataConfig, RunConfig, TrainConfig
from hfgpt.system.extras import needs
from hfgpt.training.trackers import public_options

TRACKED = ["train.trackers=[tensorboard,trackio]", "train.epochs=1", "sample.max_new_tokens=0"]
CANARY = "hf_canaryCanaryCanaryCanaryCanary12"


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory):
    """Where trackio writes: it reads the variable when it is imported."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        import trackio.utils

        assert folder == trackio.utils.TRACKIO_DIR
        yield folder


def in_tensorboard(folder):
    """(name, step) -> values, as TensorBoard reads them; a list, because nothing may come twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "trackers" / "tensorboard"))
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault((name, event.step), []).append(event.value)
    return found


def in_trackio(folder, run_name):
    """(name, step) -> value, of the run of a name, from trackio's own file."""
    with sqlite3.connect(folder / "hfgpt.db") as database:
        lines = database.execute("select step, metrics from metrics where run_name = ?", [run_name]).fetchall()
    return {(name, step): value for step, text in lines for name, value in json.loads(text).items()}


def expected(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        (f"{'evaluation' if 'val_loss' in line else 'train'}/{name}", line["step"]): value
        for line in lines
        if "checks" not in line
        for name, value in line.items()
        if name != "step"
    }


@pytest.mark.parametrize("loop", LOOPS)
def test_trackers_hold_every_number_of_the_metrics(recipe, monkeypatch, capsys, trackio_folder, loop):
    import deepspeed  # noqa: F401 - prints when it is first imported; the command line keeps that off stdout

    capsys.readouterr()
    monkeypatch.setenv("HF_TOKEN", CANARY)
    folder = run(recipe, f"seen-{loop}", f"loop={loop}", *TRACKED)

    wanted = expected(folder)
    assert len(wanted) > 60
    assert ("train/grad_norm", 3) in wanted
    trackio, tensorboard = in_trackio(trackio_folder, folder.name), in_tensorboard(folder)
    assert {key: value for key, value in trackio.items() if not key[0].startswith("check/")} == wanted
    for key, value in wanted.items():
        assert tensorboard[key] == [pytest.approx(value, rel=1e-6)]  # TensorBoard keeps fp32
    # Results go to stdout, nothing else, and no run is left that would end once more with the program and say so.
    assert capsys.readouterr().out == ""
    assert sys.modules["trackio"].context_vars.current_run.get() is None
    # Neither the token nor the folders above the run's own; file names of TensorBoard hold the machine's.
    written = [path for root in (folder / "trackers", trackio_folder) for path in root.rglob("*") if path.is_file()]
    private = [CANARY, str(recipe.parent), os.environ["PATH"]]
    for path in written:
        content = path.read_bytes()
        assert not any(text.encode() in content for text in private), path
    options = b"".join(path.read_bytes() for path in (folder / "trackers").rglob("hparams.yml"))
    assert b"optim.learning_rate: 0.003" in options
    assert b"data.files: text.txt" in options


def test_a_tracked_run_is_the_run_it_would_be_and_goes_on_where_it_stopped(recipe, trackio_folder):
    plain = run(recipe, "plain", *TRACKED, "train.trackers=[]")
    run_until_killed(recipe, "tracked", 6, *TRACKED)
    tracked = run(recipe, "tracked", *TRACKED, resume=True)

    assert metrics(tracked) == metrics(plain)
    losses = {key: values for key, values in in_tensorboard(tracked).items() if key[0] == "train/loss"}
    assert losses == {
        ("train/loss", line["step"]): [pytest.approx(line["loss"], rel=1e-6)] for line in training_lines(tracked)
    }
    with sqlite3.connect(trackio_folder / "hfgpt.db") as database:
        runs = database.execute("select distinct run_id from metrics where run_name = 'tracked'").fetchall()
    assert len(runs) == 1


def test_who_watches_may_change_when_a_run_goes_on(recipe, trackio_folder):
    folder = run(recipe, "out", "train.epochs=1", "sample.max_new_tokens=0")
    (folder / "results.json").unlink()

    run(recipe, "out", *TRACKED, "train.trackers=[tensorboard]", resume=True)

    assert (folder / "results.json").is_file()


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_told_before_anything_is_written(recipe, monkeypatch, name):
    monkeypatch.setattr("hfgpt.training.trackers.find_spec", lambda name: None)

    with pytest.raises(ValueError, match=re.escape(needs(f"`train.trackers=[{name}]`", name))):
        run(recipe, "out", f"train.trackers=[{name}]")

    assert not (recipe.parent / "out").exists()


def test_an_unknown_tracker_is_refused_with_those_there_are(recipe):
    with pytest.raises(ValueError, match=r"`train\.trackers` must be one of .*'trackio'.*, got 'tensorbord'"):
        load_config(recipe, ["train.trackers=[tensorbord]"])


def test_options_leave_without_folders_and_passwords(recipe):
    address = "https://user:secret@host/texts/one.txt?token=secret"
    config = load_config(recipe, [f"data.files=[{address},/home/user/two.txt]", "output_dir=/home/user/out/run"])

    options = public_options(config)

    assert options["data.files"] == "one.txt, two.txt"
    assert options["output_dir"] == "run"
    assert options["model.hidden_size"] == 32
    assert "secret" not in str(options)
    assert "user" not in str(options)


@pytest.mark.parametrize(
    ("source", "sent"),
    [("/home/anna/private/set", "set"), ("../private/set", "set"), ("anna/set", "anna/set"), ("pydoc", "pydoc")],
)
def test_a_data_set_in_a_folder_goes_by_its_last_name_only(source, sent):
    config = RunConfig(data=DataConfig(source=source), train=TrainConfig(max_steps=1))

    assert public_options(config)["data.source"] == sent
