"""NaN and infinity: they are found before they spoil a weight, named by their origin, and never saved."""

import json

import pytest
import torch
from runs import (
    DROPOUT,
    LOOPS,
    NO_DROPOUT,
    assert_same_run,
    metrics,
    run,
    run_to_step,
    run_until_killed,
    start_at_first_checkpoint,
    training_lines,
)
from safetensors.torch import load_file

from hfgpt import HFGPTConfig, HFGPTForCausalLM
from hfgpt.config.loading import load_config
from hfgpt.config.schema import TrainConfig
from hfgpt.training import run as run_module
from hfgpt.training.checkpoint import TrainState, checkpoints
from hfgpt.training.nonfinite import MOST_SKIPPED_IN_A_ROW, NonFiniteGuard, check_finite_weights
from hfgpt.training.recorder import Recorder

SKIP = ["train.on_nonfinite=skip", "train.epochs=1", "train.save_every=1", "train.eval_every=1000"]
SKIP += ["sample.max_new_tokens=0"]
WITH_DROPOUT = [f"model.{name}={value}" for name, value in DROPOUT.items()]


@pytest.fixture
def poisoned(monkeypatch):
    """A function that lets the second block's MLP overflow in training, in batches that a test picks by their ids."""
    make_model = run_module.make_model

    def poison(picks):
        def make(*arguments):
            model = make_model(*arguments)
            state = {"is_picked": False}

            def look(module, args, kwargs):
                state["is_picked"] = module.training and picks(kwargs["input_ids"])

            model.register_forward_pre_hook(look, with_kwargs=True)
            model.model.layers[1].mlp.register_forward_hook(
                lambda module, inputs, output: output * torch.inf if state["is_picked"] else output
            )
            return model

        monkeypatch.setattr(run_module, "make_model", make)

    return poison


@pytest.fixture
def third_step(recipe):
    """A pick: the batch of the third step."""
    return pick_step(recipe, 3)


def pick_step(recipe, number):
    from hfgpt.data.loaders import train_loader
    from hfgpt.training.run import open_run

    prepared = open_run(load_config(recipe, [f"output_dir={recipe.parent / 'unused'}"]))
    prepared.lock.release()
    ids = [batch["input_ids"] for batch in train_loader(prepared.rows.train, 4, seed=0)][number - 1]
    return lambda input_ids: torch.equal(input_ids, ids)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_stops_before_its_weights_are_spoilt_and_says_where_it_began(recipe, poisoned, third_step, loop):
    poisoned(third_step)

    with pytest.raises(FloatingPointError) as caught:
        run(recipe, "out", f"loop={loop}", "train.save_every=1", "train.log_every=20")

    assert "the gradient norm is nan at step 3 (the output of `model.layers.1.mlp` is the first" in str(caught.value)
    assert "Lower `optim.learning_rate`" in str(caught.value)
    assert [path.name for path in checkpoints(recipe.parent / "out")] == ["checkpoint-2", "checkpoint-1"]


def test_skipping_leaves_one_step_out_in_both_loops_alike(recipe, poisoned, third_step, capsys):
    poisoned(third_step)

    one, other = (run(recipe, loop, f"loop={loop}", *SKIP, *WITH_DROPOUT) for loop in LOOPS)

    assert_same_run(one, other)
    steps = [line["step"] for line in training_lines(one)]
    assert steps == [1, 2, *range(4, len(steps) + 2)]
    (skipped,) = [line for line in metrics(one) if "skipped" in line]
    assert skipped["step"] == 3
    assert skipped["skipped"] == "the output of `model.layers.1.mlp` is the first that is not finite"
    weights = [load_file(one / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3, 4)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[1]["model.norm.weight"], weights[2]["model.norm.weight"])
    averages = [
        next(iter(torch.load(one / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["state"].values()))
        for step in (2, 3)
    ]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])
    assert json.loads((one / "results.json").read_text())["skipped_steps"] == 1
    assert "left out: the gradient norm is nan" in capsys.readouterr().err


def test_looking_for_the_origin_changes_no_later_step(recipe, poisoned, third_step, monkeypatch):
    poisoned(third_step)
    looked = run(recipe, "looked", *SKIP, *WITH_DROPOUT)

    monkeypatch.setattr("hfgpt.training.nonfinite.repeat_step", lambda *_: None)
    blind = run(recipe, "blind", *SKIP, *WITH_DROPOUT)

    assert training_lines(looked) == training_lines(blind)
    assert (looked / "model.safetensors").read_bytes() == (blind / "model.safetensors").read_bytes()


@pytest.mark.parametrize("loop", LOOPS)
def test_checkpoints_from_before_the_first_step_that_counted_change_nothing(recipe, poisoned, loop):
    """The optimizer has no state yet, and torch, asked for it, makes a step of its own."""
    poisoned(pick_step(recipe, 1))
    overrides = [f"loop={loop}", *SKIP]
    rare = run(recipe, "rare", *overrides, "train.save_every=1000")

    often = run(recipe, "often", *overrides)
    start_at_first_checkpoint(often, recipe.parent / "again")
    again = run(recipe, "again", *overrides, resume=True)

    assert training_lines(often) == training_lines(rare)
    assert (often / "model.safetensors").read_bytes() == (rare / "model.safetensors").read_bytes()
    assert_same_run(often, again)


def test_too_many_in_a_row_stop_the_run_also_across_a_resume(recipe, poisoned):
    poisoned(lambda input_ids: True)
    overrides = ["train.on_nonfinite=skip", "train.save_every=1"]
    run_until_killed(recipe, "out", 4, *overrides)
    with pytest.raises(FloatingPointError, match=r"at step 11 .*as in 10 steps before it, which were left out"):
        run(recipe, "out", *overrides, resume=True)

    assert MOST_SKIPPED_IN_A_ROW == 10
    assert checkpoints(recipe.parent / "out")[0].name == "checkpoint-10"


def recorder_at(tmp_path, step):
    settings = {"max_new_tokens": 0, "temperature": 0.8, "top_k": 50}
    return Recorder(tmp_path, 100, "The", settings, TrainState(step=step, tokens=step))


def test_only_steps_that_follow_one_another_count_as_in_a_row(tmp_path):
    def recorder(step):
        return recorder_at(tmp_path, step)

    first = recorder(0)
    for step in (2, 3, 5, 6, 7):
        first.log_skipped_step(step, step, float("nan"), "somewhere")

    for step, count in [(7, 3), (6, 2), (4, 0), (3, 2), (0, 0)]:
        assert recorder(step).count_in_a_row(lambda line: "skipped" in line) == count  # each cuts what is after it
    first.close()


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_weights_that_are_spoilt_already_stop_the_run_under_either_policy(recipe, monkeypatch, policy):
    def spoil(run, control):
        run.model.model.layers[0].self_attn.k_proj.weight.data[0, 0] = torch.nan
        return run_loop(run, control)

    from hfgpt.training.loop import run_loop

    monkeypatch.setattr("hfgpt.training.loop.run_loop", spoil)

    with pytest.raises(FloatingPointError, match=r"step 1 \(the weights `model\.layers\.0\.self_attn\.k_proj\.weight`"):
        run(recipe, "out", f"train.on_nonfinite={policy}")

    assert not checkpoints(recipe.parent / "out")


def test_a_gradient_that_alone_is_not_finite_is_named(recipe, monkeypatch):
    make_model = run_module.make_model

    def make(*arguments):
        model = make_model(*arguments)
        model.model.layers[0].input_layernorm.weight.register_hook(lambda gradient: gradient * torch.inf)
        return model

    monkeypatch.setattr(run_module, "make_model", make)

    with pytest.raises(FloatingPointError, match=r"the gradient of `model\.layers\.0\.input_layernorm\.weight` is"):
        run(recipe, "out")


def test_spoilt_weights_are_not_saved_as_the_model_either(tiny):
    model = HFGPTForCausalLM(HFGPTConfig(**{**tiny, **NO_DROPOUT}))
    check_finite_weights(model, step=3)
    model.model.norm.bias.data[3] = torch.inf

    with pytest.raises(FloatingPointError, match=r"the weights `model\.norm\.bias` are not finite at step 3"):
        check_finite_weights(model, step=3)


def test_skipping_under_fp16_is_refused_because_its_scaler_does(recipe):
    with pytest.raises(ValueError, match=r"`train\.on_nonfinite` \(skip\) has no effect"):
        load_config(recipe, ["train.on_nonfinite=skip", "train.precision=fp16"])


@pytest.fixture
def change_model(monkeypatch):
    """A function that lets each run change its model before it trains."""
    make_model = run_module.make_model

    def change_with(change):
        def make(*arguments):
            model = make_model(*arguments)
            change(model)
            return model

        monkeypatch.setattr(run_module, "make_model", make)

    return change_with


def lose_gradients(model):
    for parameter in model.parameters():
        parameter.register_hook(torch.zeros_like)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_that_learns_nothing_stops_at_its_third_step_also_across_a_resume(recipe, change_model, loop):
    change_model(lose_gradients)
    overrides = [f"loop={loop}", "train.save_every=1"]

    with pytest.raises(FloatingPointError) as caught:
        run(recipe, "out", *overrides)
    run_to_step(recipe, "again", 1, *overrides)  # the stop is seen in the step after
    with pytest.raises(FloatingPointError) as resumed:
        run(recipe, "again", *overrides, resume=True)

    assert "the gradient norm is exactly 0 at step 3, as in the steps before it: nothing is learnt" in str(caught.value)
    assert "usually a loss that does not reach the weights, or a text learnt to a loss of exactly 0" in str(
        caught.value
    )
    assert str(resumed.value) == str(caught.value)
    assert [path.name for path in checkpoints(recipe.parent / "out")] == ["checkpoint-2", "checkpoint-1"]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_model_of_which_one_weight_alone_is_trained_runs_on(recipe, change_model, loop):
    def freeze(model):
        model.requires_grad_(False)
        model.model.norm.weight.requires_grad_()

    change_model(freeze)

    folder = run(recipe, "out", f"loop={loop}", "train.epochs=1")

    assert len(training_lines(folder)) > 3
    assert all(line["grad_norm"] > 0 for line in training_lines(folder))


@pytest.mark.parametrize(
    ("precision", "steps", "stops"),
    [
        ("fp32", [(0.0, 9), (0.0, 9), (0.0, 9)], True),
        ("fp32", [(0.0, 9), (0.0, 9), (0.5, 9), (0.0, 9), (0.0, 9)], False),
        ("fp32", [(0.0, 0), (0.0, 0), (0.0, 0), (0.0, 9), (0.0, 9)], False),  # without targets
        ("fp32", [(0.0, 9), (0.0, 0), (0.0, 9), (0.0, 0), (0.0, 9)], True),
        ("fp16", [(float("inf"), 9)] * 5, False),  # the scaler looks for its scale
        ("fp16", [(0.0, 9), (0.0, 9), (float("nan"), 9), (float("inf"), 9)], False),
        ("fp16", [(float("inf"), 9), (0.0, 9), (float("inf"), 9), (0.0, 9), (0.0, 9)], True),
    ],
)
def test_steps_that_had_no_targets_or_were_skipped_by_a_scaler_count_for_nothing(tmp_path, precision, steps, stops):
    guard = NonFiniteGuard(torch.nn.Linear(1, 1), TrainConfig(precision=precision), recorder_at(tmp_path, 0))

    def walk():
        for number, (norm, targets) in enumerate(steps, start=1):
            assert guard.should_step(TrainState(step=number), torch.tensor(norm), [], torch.tensor(targets))

    if not stops:
        walk()
        return
    with pytest.raises(FloatingPointError, match=f"exactly 0 at step {len(steps)}") as caught:
        walk()
    assert ("gradients too small for fp16 (use bf16)" in str(caught.value)) == (precision == "fp16")
