"""Both loops: the same path, step for step, and the same path after a stop."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from runs import (
    DROPOUT,
    LOOPS,
    NO_DROPOUT,
    TIMINGS,
    assert_same_run,
    files,
    metrics,
    run,
    run_to_step,
    run_until_killed,
    training_lines,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfgpt import HFGPTForCausalLM
from hfgpt.config.loading import config_yaml, load_config
from hfgpt.data.loaders import eval_loader
from hfgpt.evaluation.loss import score_batches
from hfgpt.results.records import read_results
from hfgpt.system.storage import seal, unseal
from hfgpt.training.checkpoint import checkpoints
from hfgpt.training.evaluate import score_rows
from hfgpt.training.run import check_folder, open_run
from hfgpt.training.signals import StopRequest
from hfgpt.training.train import train


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="accumulation 1"),
        pytest.param(["train.gradient_accumulation_steps=4", "optim.max_grad_norm=0.5"], id="accumulation 4"),
        pytest.param(
            ["train.epochs=null", "train.max_steps=11", "train.log_every=3", "train.eval_every=epoch"],
            id="stopped in an epoch, evaluated at its end",
        ),
        pytest.param(["train.save_every=epoch", "optim.max_grad_norm=0", "optim.schedule=linear"], id="no clipping"),
        pytest.param(["train.precision=bf16", "train.epochs=1"], id="bf16"),
        pytest.param([f"model.{name}={value}" for name, value in DROPOUT.items()], id="dropout"),
    ],
)
def test_trainer_walks_the_same_path_to_the_last_bit(recipe, overrides):
    loops = [run(recipe, loop, f"loop={loop}", *overrides) for loop in LOOPS]

    assert len(training_lines(loops[0])) >= 3
    assert_same_run(*loops)  # losses, norms, evaluations, samples, checkpoints, weights: difference 0.0


def test_micro_batches_of_the_tests_hold_unequal_numbers_of_targets(recipe):
    prepared = open_run(load_config(recipe))

    assert prepared is not None
    assert len(prepared.rows.train) % 4 > 0  # a short last micro-batch ...
    micro_batches = math.ceil(len(prepared.rows.train) / prepared.global_batch)
    assert micro_batches % 4 > 1  # ... in a step with others, of fewer than 4
    prepared.lock.release()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("stopped_at", [7, 10, 3])
def test_resuming_equals_never_stopping_with_dropout_in_the_middle_of_an_epoch(recipe, loop, stopped_at):
    overrides = [f"loop={loop}", "train.gradient_accumulation_steps=2", *(f"model.{k}={v}" for k, v in DROPOUT.items())]
    whole = run(recipe, "whole", *overrides)

    run_until_killed(recipe, "stopped", stopped_at, *overrides)
    assert not (recipe.parent / "stopped" / "results.json").exists()
    stopped = run(recipe, "stopped", *overrides, resume=True)

    assert_same_run(whole, stopped)


@pytest.mark.parametrize("loop", LOOPS)
def test_resuming_a_run_that_was_stopped_after_its_last_step_equals_never_stopping(recipe, monkeypatch, loop):
    overrides = [f"loop={loop}", "train.epochs=null", "train.max_steps=11", "train.log_every=3"]
    overrides += ["optim.schedule=constant", *(f"model.{name}={value}" for name, value in DROPOUT.items())]
    whole = run(recipe, "whole", *overrides)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hfgpt.training.finish.ngram_perplexities", stop)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, "stopped", *overrides)
    stopped = run(recipe, "stopped", *overrides, resume=True)

    assert_same_run(whole, stopped)


@pytest.mark.parametrize("loop", LOOPS)
def test_lines_are_the_same_after_a_stop_between_two_of_them(recipe, loop):
    overrides = [f"loop={loop}", "train.log_every=3", "train.save_every=4", "train.epochs=1"]
    whole = run(recipe, "whole", *overrides)
    run_until_killed(recipe, "stopped", 5, *overrides)

    assert_same_run(whole, run(recipe, "stopped", *overrides, resume=True))


def test_going_on_from_an_older_checkpoint_puts_the_newer_ones_aside(recipe):
    whole = run(recipe, "whole")
    again = run(recipe, "again")
    (again / "results.json").unlink()

    run(recipe, "again", resume=str(again / "checkpoint-8"))

    assert metrics(whole) == metrics(again)
    assert (again / "superseded-checkpoint-12").is_dir()
    assert (again / "checkpoint-12").is_dir()


def test_going_on_with_another_text_is_refused(recipe):
    folder = run(recipe, "out")
    (folder / "results.json").unlink()
    before = files(folder)
    text = recipe.parent / "text.txt"
    text.write_text(text.read_text().replace("License", "license"))

    with pytest.raises(ValueError, match="was written with another"):
        run(recipe, "out", resume=True)

    assert files(folder) == before


def test_going_on_with_other_rows_per_step_is_refused(recipe):
    folder = run(recipe, "out")
    (folder / "results.json").unlink()

    with pytest.raises(ValueError, match="another number of rows per step: 4, now 8"):
        run(recipe, "out", "train.batch_size=8", resume=True)
    with pytest.raises(ValueError, match=r"its `train\.batch_size` is 4, this one's 8"):
        run(recipe, "out", "train.batch_size=8")


@pytest.mark.parametrize("loop", LOOPS)
def test_going_on_with_smaller_micro_batches_sees_the_same_rows_in_every_step(recipe, loop):
    whole = run(recipe, "whole", f"loop={loop}")
    run_until_killed(recipe, "other", 10, f"loop={loop}")
    other = run(
        recipe, "other", f"loop={loop}", "train.batch_size=2", "train.gradient_accumulation_steps=2", resume=True
    )

    for mine, theirs in zip(training_lines(other), training_lines(whole), strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)  # the same sums in another order
    assert "batch_size: 2" in (other / "run.yaml").read_text()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_that_diverges_keeps_its_good_checkpoints(recipe, loop):
    overrides = [f"loop={loop}", "optim.learning_rate=1e30", "optim.warmup_steps=5", "optim.max_grad_norm=0"]

    with pytest.raises(FloatingPointError, match="training diverged"):
        run(recipe, "out", *overrides, "train.save_every=1", "train.log_every=20", "train.keep_last=2")

    for checkpoint in checkpoints(recipe.parent / "out"):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())


def test_fp16_on_a_cpu_is_refused(recipe):
    if torch.cuda.is_available():
        pytest.skip("this machine computes in fp16")
    with pytest.raises(ValueError, match="a CPU does not compute in"):
        run(recipe, "out", "train.precision=fp16")


def test_a_run_killed_before_its_first_checkpoint_starts_again_and_repeats_no_line(recipe):
    whole = run(recipe, "whole", "train.save_every=0")
    run_until_killed(recipe, "stopped", 6, "train.save_every=0")
    stopped = run(recipe, "stopped", "train.save_every=0", resume=True)

    assert_same_run(whole, stopped)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(recipe, monkeypatch, capsys):
    whole = run(recipe, "whole")
    stopped = run(recipe, "stopped")
    newest = checkpoints(stopped)[0]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    (stopped / "results.json").unlink()

    run(recipe, "stopped", resume=True)

    assert f"skipped {newest.name}" in capsys.readouterr().err
    assert_same_run(whole, stopped)


def test_accumulating_equals_a_larger_batch(recipe):
    accumulated = run(recipe, "accumulated", "train.batch_size=2", "train.gradient_accumulation_steps=4")
    at_once = run(recipe, "at_once", "train.batch_size=8")

    for one, other in zip(training_lines(accumulated), training_lines(at_once), strict=True):
        assert one["tokens"] == other["tokens"]
        # The same sums in another order; the difference grows along the run.
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_looking_more_often_changes_no_step(recipe):
    overrides = [f"model.{name}={value}" for name, value in DROPOUT.items()]
    often = run(recipe, "often", "train.eval_every=1", "train.save_every=1", *overrides)
    seldom = run(recipe, "seldom", "train.eval_every=1000", "train.save_every=0", *overrides)

    assert training_lines(often) == training_lines(seldom)
    assert torch.equal(*(load_file(f / "model.safetensors")["model.norm.weight"] for f in (often, seldom)))


def test_another_seed_is_another_run(recipe):
    one, other = run(recipe, "one"), run(recipe, "other", "seed=1")

    assert training_lines(one)[0]["loss"] != training_lines(other)[0]["loss"]


def test_a_run_leaves_all_that_was_promised(recipe):
    folder = run(recipe, "out", "train.epochs=12")

    names = {path.name for path in folder.iterdir()}
    assert names >= {
        *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "run.yaml"),
        *("gpt.py", "loss.py", "configuration_hfgpt.py", "modeling_hfgpt.py"),
        *("metrics.jsonl", "results.json", "loss.png", "samples.md"),
    }
    first, last = ([line for line in metrics(folder) if "val_loss" in line][i] for i in (0, -1))
    assert first["step"] == 0
    assert first["val_loss"] == pytest.approx(math.log(300), abs=0.1)  # a new model finds every token as likely
    assert last["val_loss"] < first["val_loss"] - 0.3
    assert last.keys() == {"step", "tokens", "train_loss", "val_loss", "val_perplexity"}
    assert training_lines(folder)[0].keys() == {"step", "loss", "grad_norm", "learning_rate", "tokens"}
    results = json.loads((folder / "results.json").read_text())
    assert results.keys() >= {*last, "unigram_perplexity", "bigram_perplexity", "environment", *TIMINGS} - {
        "tokens_per_second",
        "peak_share",  # on a GPU
    }
    assert load_config(folder / "run.yaml") == load_config(recipe, [f"output_dir={folder}", "train.epochs=12"])
    assert (folder / "samples.md").read_text().count("## step") == 2 + last["step"] // 5 - (last["step"] % 5 == 0)
    assert folder.joinpath("model.safetensors").stat().st_mode & 0o044 == 0o044  # others may read it


@pytest.mark.parametrize("place", [".", "checkpoint-8"])
def test_the_folder_and_every_checkpoint_load_through_auto_classes_and_generate(recipe, place):
    folder = run(recipe, "out") / place

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The", return_tensors="pt")
    text = model.generate(**ids, max_new_tokens=5, do_sample=True, top_k=5, temperature=0.7)

    assert isinstance(model, HFGPTForCausalLM)
    assert tokenizer.decode(text[0]).startswith("The")


def test_a_finished_run_is_left_as_it_is(recipe):
    folder = run(recipe, "out")
    before = files(folder), metrics(folder)

    config = load_config(recipe, [f"output_dir={folder}"])

    for results in (train(config), train(config, resume=True)):
        assert results.was_finished
        assert results == read_results(folder / "results.json")
    assert (files(folder), metrics(folder)) == before


@pytest.fixture
def tuned(recipe, random_gpt2, tokenizer):
    """A recipe that starts from a GPT-2 folder, `recipe.parent / "gpt2"`, with its tokenizer."""
    source = recipe.parent / "gpt2"
    random_gpt2.save_pretrained(source)
    tokenizer.save_pretrained(source)
    config = yaml.safe_load(recipe.read_text())
    config["model"] = NO_DROPOUT
    config["tokenizer"] = {}
    path = recipe.parent / "tuned.yaml"
    path.write_text(yaml.safe_dump({**config, "init_from": str(source)}))
    return path


@pytest.mark.parametrize("loop", LOOPS)
def test_a_fine_tuned_run_goes_on_bit_for_bit_without_the_model_that_it_started_from(tuned, loop):
    overrides = [f"loop={loop}", "data.block_size=32", "train.epochs=2"]
    whole = run(tuned, "whole", *overrides)
    stopped = run_until_killed(tuned, "stopped", 9, *overrides)
    (tuned.parent / "gpt2").rename(tuned.parent / "moved away")

    run(tuned, "stopped", *overrides, resume=True)

    assert_same_run(whole, stopped)
    assert json.loads((stopped / "results.json").read_text())["run"]["starts_from"] == "folder"


def test_fine_tuning_goes_on_from_a_gpt2_folder_with_its_tokenizer(tuned, tokenizer):
    folder = run(tuned, "out", "data.block_size=32", "train.epochs=2")

    model = HFGPTForCausalLM.from_pretrained(folder)
    assert model.config.resid_pdrop == 0
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder)) == len(tokenizer)
    assert metrics(folder)[-1]["val_loss"] < next(line for line in metrics(folder) if "val_loss" in line)["val_loss"]
    names = set(load_file(folder / "model.safetensors"))
    assert "model.layers.0.self_attn.q_proj.weight" in names  # hfgpt's own layout


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder.write_text("mine"), "is a file"),
        (lambda folder: (folder.mkdir(), (folder / "notes.txt").write_text("mine")), "something else"),
        (lambda folder: (folder.mkdir(), (folder / "run.yaml").write_text("seed: 7\n")), "another run"),
    ],
)
def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_was(recipe, prepare, message):
    folder = recipe.parent / "out"
    prepare(folder)
    before = folder.read_bytes() if folder.is_file() else {p.name: p.read_bytes() for p in folder.iterdir()}

    with pytest.raises(ValueError, match=message):
        run(recipe, "out")

    after = folder.read_bytes() if folder.is_file() else {p.name: p.read_bytes() for p in folder.iterdir()}
    assert after == before


def test_another_run_in_the_folder_is_refused(recipe):
    folder = run(recipe, "out")
    before = files(folder)

    with pytest.raises(ValueError, match="holds another run"):
        run(recipe, "out", "seed=3")

    assert files(folder) == before


def test_another_run_is_told_by_the_option_where_its_section_was_left_out(recipe):
    folder = recipe.parent / "out"
    folder.mkdir()
    config = load_config(recipe)
    (folder / "run.yaml").write_text(config_yaml(replace(config, model={})))

    with pytest.raises(ValueError, match=r"its `model\.attn_pdrop` is None, this one's 0\.0"):
        check_folder(config, folder, resume=False)


def test_a_checkpoint_that_does_not_name_its_origins_takes_those_of_the_recipe(recipe):
    folder = run_to_step(recipe, "out", 3)
    manifest = checkpoints(folder)[0] / "manifest.json"
    content = unseal(manifest.read_text())
    assert content.pop("origins") == {"model": "nothing", "tokenizer": "nothing"}
    manifest.write_text(seal(content))

    run(recipe, "out", resume=True)

    assert json.loads((folder / "results.json").read_text())["run"]["starts_from"] == "nothing"


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(recipe):
    folder = run(recipe, "out")
    (folder / "results.json").unlink()

    with pytest.raises(ValueError, match=r"no such checkpoint.*checkpoint-\d+"):
        run(recipe, "out", resume=str(folder / "checkpoint-999"))


def test_a_run_that_cannot_be_made_ready_writes_nothing(recipe):
    for override, message in [
        ("data.validation_fraction=0.001", "fewer than one block"),
        ("sample.max_new_tokens=70", "Shorten the sample"),
        ("optim.schedule=cosin", "must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(recipe, "out", override)

        assert not Path(recipe.parent / "out").exists()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_warmup_that_is_longer_than_the_text_gives_steps_is_shortened_and_said(recipe, capsys, loop):
    words = [f"loop={loop}", "train.epochs=2", "optim.warmup_steps=1000"]  # how many steps that is, no recipe knows

    run_until_killed(recipe, "out", 8, *words)
    folder = run(recipe, "out", *words, resume=True)

    total = metrics(folder)[-1]["step"]
    rates = [line["learning_rate"] for line in training_lines(folder)]
    assert rates.index(max(rates)) == total // 10 == 2
    assert max(rates) == 3e-3
    said = f"warning: `optim.warmup_steps` (1000) is longer than the run ({total}): 2 are taken"
    assert capsys.readouterr().err.count(said) == 2  # by each process
    results = json.loads((folder / "results.json").read_text())
    assert results["run"]["optim"]["warmup_steps"] == 2
    assert load_config(folder / "run.yaml").optim.warmup_steps == 1000  # what was asked for


@pytest.mark.slow
def test_a_compiled_model_takes_the_same_steps(recipe):
    eager = run(recipe, "eager", "train.epochs=1")
    compiled = run(recipe, "compiled", "train.epochs=1", "train.compile=true")

    for mine, theirs in zip(training_lines(compiled), training_lines(eager), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)  # fused sums round otherwise


def test_all_validation_rows_are_scored_at_the_end_even_if_training_has_fewer(recipe):
    text = (recipe.parent / "text.txt").read_text()
    (recipe.parent / "short.txt").write_text(text[:1500])
    (recipe.parent / "long.txt").write_text(text[1500:])
    files = [f"data.files={recipe.parent / 'short.txt'}", f"data.validation_files={recipe.parent / 'long.txt'}"]

    folder = run(recipe, "out", *files, "data.validation_fraction=0.1", "train.epochs=1", "optim.warmup_steps=1")

    results = json.loads((folder / "results.json").read_text())
    rows = open_run(load_config(folder / "run.yaml", [f"output_dir={recipe.parent / 'new'}"])).rows
    model = HFGPTForCausalLM.from_pretrained(folder)
    assert len(rows.validation) > len(rows.train)
    assert results["val_loss"] == score_batches(model, eval_loader(rows.validation, 4)).loss


def test_an_evaluation_before_training_has_the_precision_of_the_run(recipe):
    prepared = open_run(load_config(recipe, ["train.precision=bf16"]))
    with torch.autocast("cpu", torch.bfloat16):
        expected = score_batches(prepared.model, eval_loader(prepared.rows.validation, 4)).loss

    with StopRequest() as stop:
        found = score_rows(prepared, prepared.rows.validation, stop).loss

    assert found == expected
    assert found != score_batches(prepared.model, eval_loader(prepared.rows.validation, 4)).loss  # in fp32
    prepared.lock.release()
