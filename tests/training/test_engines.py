"""Engines of accelerate on two processes: the steps of one, in both loops, stopped and gone on.

DeepSpeed runs on CPUs; FSDP2 does where accelerate is told that they are GPUs (odd_run.py).
"""

import json
import os
import signal

import pytest
import torch
from runs import (
    DROPOUT,
    LOOPS,
    assert_same_path,
    assert_same_run,
    metrics,
    run,
    run_to_step,
    start_at_first_checkpoint,
    training_lines,
    wait_for_step,
    workers_of,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hfgpt.config.loading import load_config
from hfgpt.distributed import deepspeed
from hfgpt.training.checkpoint import checkpoints, newest_checkpoint, verify_checkpoint

WITH_DROPOUT = [f"model.{name}={value}" for name, value in DROPOUT.items()]
UNEVEN = ["train.gradient_accumulation_steps=3", "optim.max_grad_norm=0.5"]  # a last step of fewer micro-batches

ENGINES_AND_LOOPS = [
    pytest.param("zero2", "accelerate"),
    *[pytest.param(engine, "accelerate", marks=pytest.mark.slow) for engine in ("zero1", "zero3", "fsdp2")],
    *[pytest.param(engine, "trainer", marks=pytest.mark.slow) for engine in ("zero1", "zero2", "zero3", "fsdp2")],
]


@pytest.fixture
def launched(launch, recipe):
    """A function that runs the recipe on two processes to its end, and gives its folder."""

    def launched(name, *overrides, engine, **kwargs):
        process = launch(name, *overrides, engine=engine, **kwargs)
        assert process.wait(timeout=240) == 0, log_of(recipe.parent / name)[-3000:]
        return recipe.parent / name

    return launched


def log_of(folder):
    return folder.with_name(f"{folder.name}.log").read_text(errors="replace")


def optimizer_of(checkpoint):
    return torch.load(checkpoint / "optimizer.pt", weights_only=True)


@pytest.mark.parametrize(("engine", "loop"), ENGINES_AND_LOOPS)
def test_an_engine_takes_the_same_steps_as_one_process_and_leaves_the_same_files(recipe, launched, engine, loop):
    one = run(recipe, "one", f"loop={loop}", *UNEVEN)

    two = launched("two", f"loop={loop}", "train.batch_size=2", *UNEVEN, engine=engine)

    assert_same_path(two, one)
    assert training_lines(one)[0]["grad_norm"] > 0.5  # so it was clipped
    for mine, theirs in zip(training_lines(two), training_lines(one), strict=True):
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=1e-5)
        assert mine["learning_rate"] == theirs["learning_rate"]
    assert {path.name for path in one.glob("*.*")} == {path.name for path in two.glob("*.*")}
    assert (two / "config.json").read_bytes() == (one / "config.json").read_bytes()
    results = json.loads((two / "results.json").read_text())
    assert results["parameters"] == 37_120
    assert results["environment"]["engine"] == ("FSDP2" if engine == "fsdp2" else "DeepSpeed")
    # The state of the optimizer is that of the run on one process: whole, and by the same names.
    mine, theirs = (optimizer_of(checkpoints(folder)[0]) for folder in (two, one))
    assert mine["param_groups"] == theirs["param_groups"]
    for name, kept in theirs["state"].items():
        for key, value in kept.items():
            torch.testing.assert_close(mine["state"][name][key], value, atol=1e-6, rtol=0)
    model = AutoModelForCausalLM.from_pretrained(two)
    for name, weight in load_file(one / "model.safetensors").items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("engine", "loop"), ENGINES_AND_LOOPS)
def test_a_run_goes_from_one_process_to_an_engine_and_back(recipe, launch, engine, loop):
    steps = [f"loop={loop}", "train.epochs=null", "train.max_steps=200", "train.save_every=50"]
    one = run(recipe, "one", "train.batch_size=8", *steps)

    other = run_to_step(recipe, "other", 11, "train.batch_size=8", *steps)
    process = launch("other", *steps, engine=engine, resume=True)
    wait_for_step(other, 20, process)
    os.kill(process.pid, signal.SIGTERM)  # the launcher, as a scheduler does; it passes it on
    assert process.wait(timeout=120) != 0
    assert "as asked. It goes on from checkpoint-" in log_of(other), log_of(other)[-3000:]
    assert 20 <= verify_checkpoint(newest_checkpoint(other, pytest.fail)).state.step < 200
    run(recipe, "other", "train.batch_size=8", *steps, resume=True)

    assert_same_path(other, one)


@pytest.mark.slow
def test_a_run_goes_on_under_another_stage(recipe, launch, launched):
    steps = ["train.epochs=null", "train.max_steps=100", "train.save_every=50"]
    one = run(recipe, "one", "train.batch_size=8", *steps)
    other = recipe.parent / "other"

    process = launch("other", *steps, engine="zero3")
    wait_for_step(other, 20, process)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=120) != 0
    assert 20 <= verify_checkpoint(newest_checkpoint(other, pytest.fail)).state.step < 100
    launched("other", *steps, engine="zero1", resume=True)

    assert_same_path(other, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "loop"),
    [("zero2", "accelerate"), ("zero3", "accelerate"), ("zero3", "trainer"), ("fsdp2", "accelerate")],
)
def test_a_killed_run_goes_on_bit_for_bit(recipe, launch, launched, engine, loop):
    overrides = [f"loop={loop}", "train.epochs=null", "train.max_steps=60", "train.save_every=3", *WITH_DROPOUT]
    whole = launched("whole", *overrides, engine=engine)
    killed = recipe.parent / "killed"

    process = launch("killed", *overrides, engine=engine)
    wait_for_step(killed, 20, process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert 18 <= verify_checkpoint(checkpoints(killed)[0]).state.step < 60
    launched("killed", *overrides, engine=engine, resume=True)

    assert_same_run(whole, killed)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_the_best_weights_come_back_where_every_process_holds_a_part(recipe, launched, engine):
    overrides = ["optim.learning_rate=0.5", "train.patience=2", "train.eval_every=2", "train.epochs=20"]

    folder = launched("out", *overrides, engine=engine)

    results = json.loads((folder / "results.json").read_text())
    best = folder / f"checkpoint-{results['best_step']}"
    assert results["best_step"] < results["last_step"]
    assert results["val_loss"] == pytest.approx(results["best_val_loss"], abs=1e-5)
    assert (folder / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_step_that_is_not_finite_is_left_out(recipe, launched, engine, loop):
    overrides = [f"loop={loop}", "train.on_nonfinite=skip", "train.save_every=1", "train.epochs=1"]

    folder = launched("out", *overrides, engine=engine, poisoned_step=3)

    (skipped,) = [line for line in metrics(folder) if "skipped" in line]
    origin = "the output of `model.layers.1.mlp` is the first that is not finite"
    assert (skipped["step"], skipped["skipped"]) == (
        3,
        origin if engine == "zero2" else "a split model is not searched",
    )
    weights = [load_file(folder / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3, 4)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[1]["model.norm.weight"], weights[2]["model.norm.weight"])
    # The schedule counts it, as under every other engine.
    whole = run(recipe, "whole", "train.epochs=1", "train.batch_size=8")
    rates = {line["step"]: line["learning_rate"] for line in training_lines(whole)}
    assert all(line["learning_rate"] == pytest.approx(rates[line["step"]]) for line in training_lines(folder))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_a_checkpoint_from_before_the_first_step_that_counted_is_as_good(recipe, launched, engine):
    """Its optimizer has no state yet."""
    overrides = ["train.on_nonfinite=skip", "train.save_every=1", "train.epochs=1"]
    whole = launched("whole", *overrides, engine=engine, poisoned_step=1)

    assert optimizer_of(whole / "checkpoint-1")["state"] == {}
    start_at_first_checkpoint(whole, recipe.parent / "split")
    assert_same_run(whole, launched("split", *overrides, engine=engine, resume=True))
    start_at_first_checkpoint(whole, recipe.parent / "plain")
    assert_same_path(run(recipe, "plain", *overrides, "train.batch_size=8", resume=True), whole)


@pytest.mark.slow
def test_a_step_that_is_not_finite_stops_the_run(recipe, launch):
    process = launch("out", "train.save_every=1", engine="zero2", poisoned_step=3)

    assert process.wait(timeout=240) != 0
    log = log_of(recipe.parent / "out")
    assert "the gradient norm is inf at step 3 (the output of `model.layers.1.mlp` is the first" in log, log[-3000:]
    assert checkpoints(recipe.parent / "out")[0].name == "checkpoint-2"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("loop", LOOPS)
def test_bf16_is_autocast_as_in_every_engine(recipe, launch, launched, engine, loop):
    """Weights and what is exchanged stay fp32: only the products of each process are rounded, as with DDP."""
    bf16 = [f"loop={loop}", "train.precision=bf16"]
    process = launch("plain", *bf16)
    assert process.wait(timeout=240) == 0

    split = launched("split", *bf16, engine=engine)

    # One process and two with DDP are 1e-4 apart, since each rounds the products of its own rows. With losses that are
    # rounded, as accelerate's FSDP2 does by itself, it would be 1e-2.
    assert_same_path(split, recipe.parent / "plain", bound=5e-4)
    assert load_file(split / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert optimizer_of(checkpoints(split)[0])["state"]["model.norm.weight"]["exp_avg"].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_state_that_lies_in_the_memory_of_the_cpu_makes_no_difference(recipe, launch, engine):
    one = run(recipe, "one", "train.batch_size=8")

    process = launch("two", engine=engine, words=["--offload_optimizer_device", "cpu"])

    assert process.wait(timeout=240) == 0, log_of(recipe.parent / "two")[-3000:]
    assert_same_path(recipe.parent / "two", one)


@pytest.mark.parametrize("engine", [pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_weights_that_three_processes_cannot_share_evenly_go_on_as_well(recipe, launched, engine):
    overrides = ["train.epochs=2", "train.save_every=1"]
    whole = launched("whole", *overrides, engine=engine, processes=3)

    start_at_first_checkpoint(whole, recipe.parent / "split")
    split = launched("split", *overrides, engine=engine, processes=3, resume=True)
    start_at_first_checkpoint(whole, recipe.parent / "plain")
    plain = run(recipe, "plain", *overrides, "train.batch_size=12", resume=True)

    assert_same_run(whole, split)
    assert_same_path(plain, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"stage": 2, "round_robin_gradients": True, "contiguous_gradients": False, "reduce_scatter": False},
        {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000},
        {"stage": 3, "sub_group_size": 3000, "stage3_param_persistence_threshold": 40, "reduce_bucket_size": 2000},
    ],
)
def test_ways_and_sizes_of_the_exchange_make_no_difference(recipe, tmp_path, launched, settings):
    (tmp_path / "deepspeed.json").write_text(json.dumps({"zero_optimization": settings}))
    words = ["--deepspeed_config_file", str(tmp_path / "deepspeed.json")]
    overrides = ["train.epochs=2", "train.save_every=1"]
    one = run(recipe, "one", "train.batch_size=8", *overrides)

    two = launched("two", *overrides, engine="json", words=words)
    start_at_first_checkpoint(two, recipe.parent / "again")
    again = launched("again", *overrides, engine="json", words=words, resume=True)

    assert_same_path(two, one)
    assert_same_run(two, again)


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_a_compiled_model_takes_the_same_steps_with_deepspeed(recipe, launched, loop):
    one = run(recipe, "one", f"loop={loop}", "train.batch_size=8", "train.epochs=1")

    two = launched("two", f"loop={loop}", "train.epochs=1", "train.compile=true", engine="zero2")

    assert_same_path(two, one)


@pytest.mark.slow
def test_deepspeed_runs_on_one_process_too(recipe, launched):
    one = run(recipe, "one", "train.epochs=1")

    assert_same_path(launched("two", "train.epochs=1", engine="zero3", processes=1), one)


@pytest.fixture
def asked(monkeypatch):
    """A launcher that asks for DeepSpeed, and a function that sets what else it says."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    return monkeypatch.setenv


@pytest.mark.parametrize(
    ("settings", "overrides", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, [], "asks for DeepSpeed's stage 0, which splits nothing"),
        ({"optimizer": {"type": "Adam", "params": {}}}, [], "a section `optimizer`: the recipe's `optim` says that"),
        ({"scheduler": {"type": "WarmupLR"}}, [], "a section `scheduler`: the recipe's `optim` says that"),
        ({"bf16": {"enabled": True}}, [], "enables `bf16`: the recipe's `train.precision` says that"),
        ({"fp16": {"enabled": True}}, [], "enables `fp16`: the recipe's `train.precision`"),
        ({"bf16": {"enabled": "true"}}, [], "enables `bf16`: the recipe's `train.precision` says that"),
        (
            {"communication_data_type": "bf16"},
            [],
            "has `communication_data_type`, which hfgpt does not drive. Leave it",
        ),
        ({"progressive_layer_drop": {"enabled": True}}, [], "has `progressive_layer_drop`, which hfgpt does not drive"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            [],
            "has `zero_quantized_weights`, which hfgpt does not drive",
        ),
        ({"bf16": None}, [], "has `bf16` None, which is no section"),
        ({"train_batch_size": 5}, [], "`train_batch_size` 5, the recipe's rows per step: 4"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            [],
            "has `offload_optimizer.super_offload`, which hfgpt does not drive",
        ),
        ({"gradient_clipping": 0.25}, [], '`gradient_clipping` 0.25, `optim.max_grad_norm`: 1.0. Make it "auto"'),
        ({"train_micro_batch_size_per_gpu": 7}, [], "`train_micro_batch_size_per_gpu` 7, `train.batch_size`: 4"),
        (
            {"gradient_accumulation_steps": 5},
            [],
            "`gradient_accumulation_steps` 5, `train.gradient_accumulation_steps`: 1",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}},
            [],
            "`offload_param` on nvme, which hfgpt does not drive. Use cpu",
        ),
        ({}, ["train.precision=fp16"], r"`train.precision` \('fp16'\) does not go with DeepSpeed"),
        ({}, ["train.shard=true"], "`train.shard` does not go with DeepSpeed, which splits by itself"),
        ({"zero_optimization": {"stage": 3}}, ["train.compile=true"], "`train.compile` does not go with .* stage 3"),
    ],
)
def test_what_launcher_and_recipe_say_differently_is_refused(recipe, asked, tmp_path, settings, overrides, message):
    (tmp_path / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, **settings}))
    asked("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "deepspeed.json"))

    with pytest.raises(ValueError, match=message):
        deepspeed.deepspeed_plugin(load_config(recipe, overrides), accumulation_steps=1)


def test_a_launcher_that_says_what_the_recipe_says_is_not_refused(recipe, asked, tmp_path):
    same = {
        "gradient_clipping": 1.0,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "train_batch_size": 12,
    }
    settings = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}, **same}
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    asked("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "deepspeed.json"))
    config = load_config(recipe, ["train.gradient_accumulation_steps=3"])

    plugin = deepspeed.deepspeed_plugin(config, accumulation_steps=1)

    assert plugin.zero_stage == 1
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == 1  # hfgpt has divided the loss already


def test_deepspeed_that_is_not_installed_is_said_in_one_line(asked, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ValueError, match=r"asks for DeepSpeed needs deepspeed \(extra `deepspeed`\): `"):
        deepspeed.backend()


def test_a_deepspeed_that_did_not_come_is_refused_before_anything_is_written(recipe, asked):
    asked("ACCELERATE_USE_CPU", "true")

    with pytest.raises(ValueError, match="asks for DeepSpeed, and accelerate gives NO: ACCELERATE_USE_CPU"):
        run(recipe, "out")
    assert not (recipe.parent / "out").exists()
