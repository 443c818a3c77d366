"""What `accelerate launch` asks for, on its command line or in its configuration file, against what the recipe says."""

import os
import subprocess
import sys

import pytest
import yaml
from runs import LOOPS, metrics, run

from hfgpt.config.loading import load_config
from hfgpt.distributed.launch import check_launcher, is_launch, options

PRECISION = "the launcher asks for `mixed_precision` bf16, the recipe for `train.precision` fp32. Set "
PRECISION += "`train.precision=bf16`, or launch with `--mixed_precision no`."
ACCUMULATION = "the launcher asks for `gradient_accumulation_steps` 4, the recipe for "
ACCUMULATION += "`train.gradient_accumulation_steps` 1. Set `train.gradient_accumulation_steps=4`, or launch with "
ACCUMULATION += "`--gradient_accumulation_steps 1`."
CLIPPING = "the launcher asks for `gradient_clipping` 0.5, the recipe for `optim.max_grad_norm` 1.0. Set "
CLIPPING += "`optim.max_grad_norm=0.5`, or launch with `--gradient_clipping 1.0`."
EAGER = "the launcher asks for `dynamo_backend` eager, the recipe for `train.compile` false. Leave it to "
EAGER += "`train.compile` (inductor), or launch with `--dynamo_backend no`."
INDUCTOR = "the launcher asks for `dynamo_backend` inductor, the recipe for `train.compile` false. Set "
INDUCTOR += "`train.compile=true`, or launch with `--dynamo_backend no`."


@pytest.fixture
def launched_with(monkeypatch):
    """A function that sets the words of the launcher, and lets it have started this process."""

    def launched_with(*words):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        line = ["python", "-m", "accelerate.commands.launch", *words, "-m", "hfgpt", "train"]
        monkeypatch.setattr("psutil.Process.parents", lambda process: [process])
        monkeypatch.setattr("psutil.Process.cmdline", lambda process: line)

    return launched_with


@pytest.mark.parametrize(
    ("environment", "overrides", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, [], PRECISION),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, ["train.precision=bf16"], "`mixed_precision` fp16, the recipe for "),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, [], "fp32. hfgpt does not train in that: launch with `--mixed_preci"),
        ({"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, [], EAGER),
        ({"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, ["train.compile=true"], "`dynamo_backend` eager, the recipe for `tr"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, [], INDUCTOR),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, [], ACCUMULATION),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, [], CLIPPING),
        ({"ACCELERATE_USE_FSDP": "true"}, ["train.compile=true"], "`train.compile` does not go with FSDP2. Set `tra"),
        ({"ACCELERATE_DYNAMO_MODE": "max-autotune"}, ["train.compile=true"], "for `dynamo_mode` (ACCELERATE_DYNAMO_MO"),
        ({"ACCELERATE_DYNAMO_USE_FULLGRAPH": "True"}, [], "`dynamo_use_fullgraph` (ACCELERATE_DYNAMO_USE_FULLGRAPH is"),
        ({"ACCELERATE_DYNAMO_USE_DYNAMIC": "True"}, [], "`dynamo_use_dynamic`"),
        ({"ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "True"}, [], "`dynamo_use_regional_compilation`"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, [], "`parallelism_config` (ACCELERATE_USE_PARALLELISM_CONFIG"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, [], "`fsdp_activation_checkpointing`"),
        ({"FSDP_IGNORED_MODULES": "norm"}, [], "`fsdp_ignored_modules` (FSDP_IGNORED_MODULES is norm)"),
        ({"ACCELERATE_DOWNCAST_BF16": "true"}, [], "`downcast_bf16` (ACCELERATE_DOWNCAST_BF16 is true)"),
        ({"XLA_USE_BF16": "1"}, [], "`mixed_precision` (XLA_USE_BF16 is 1), which hfgpt does not drive. Leave it out"),
    ],
)
@pytest.mark.parametrize("loop", LOOPS)
def test_what_launcher_and_recipe_say_differently_is_refused(
    recipe, monkeypatch, loop, environment, overrides, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        run(recipe, "out", f"loop={loop}", *overrides)

    assert message in str(caught.value)
    assert not (recipe.parent / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gradient_accumulation_steps", "4"], ACCUMULATION),
        (["--gradient-accumulation-steps=4"], ACCUMULATION),
        (["--gradient_clipping", "0.5"], CLIPPING),
        (["--zero_stage", "3"], "the launcher's `--zero_stage` has no effect without `--use_deepspeed`. Leave it out."),
        (["--fsdp_version", "2"], "`--fsdp_version` has no effect without `--use_fsdp`"),
        (["--parallelism_config_tp_size", "2"], "`--parallelism_config_tp_size` has no effect without `--use_par"),
        (["--fp8_format", "E4M3"], "`--fp8_format` has no effect without `--mixed_precision fp8`"),
        (["--downcast_bf16"], "`--downcast_bf16` has no effect without `--tpu`"),
    ],
)
def test_what_the_launcher_itself_forgets_is_refused(recipe, launched_with, words, message):
    launched_with(*words)

    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        check_launcher(load_config(recipe))

    assert message in str(caught.value)


def test_words_that_an_engine_reads_are_left_to_it(recipe, launched_with, monkeypatch):
    launched_with("--zero_stage", "3", "--fsdp_version", "2", "--megatron_lm_tp_degree", "2")
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")

    check_launcher(load_config(recipe))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_launcher_that_says_what_the_recipe_says_or_nothing_changes_nothing(recipe, monkeypatch, launched_with, loop):
    overrides = [f"loop={loop}", "train.epochs=1", "train.precision=bf16", "train.gradient_accumulation_steps=3"]
    expected = metrics(run(recipe, "plain", *overrides))

    launched_with("--gradient_accumulation_steps", "3", "--gradient_clipping", "1", "--num_processes", "1")
    assert metrics(run(recipe, "silent", *overrides)) == expected
    for name, value in [("MIXED_PRECISION", "bf16"), ("DYNAMO_BACKEND", "NO"), ("DYNAMO_MODE", "default")]:
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    for name in ("FULLGRAPH", "DYNAMIC", "REGIONAL_COMPILATION"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_USE_{name}", "False")

    assert metrics(run(recipe, "launched", *overrides)) == expected


def test_a_run_leaves_no_precision_to_the_next_one(recipe):
    run(recipe, "half", "loop=trainer", "train.epochs=1", "train.precision=bf16")

    run(recipe, "full", "loop=trainer", "train.epochs=1")


@pytest.mark.parametrize(
    "line",
    [
        ["python", "/usr/bin/accelerate", "launch", "--cpu", "-m", "hfgpt"],
        ["accelerate", "launch", "--cpu", "-m", "hfgpt"],
        ["python", "/usr/bin/accelerate-launch", "--cpu", "-m", "hfgpt"],
        ["python", "-m", "accelerate.commands.launch", "--cpu", "-m", "hfgpt"],
        ["python", "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "-m", "hfgpt"],
    ],
)
def test_a_launcher_is_known_by_its_command_line(line):
    before = ["", *line]

    (place,) = [at for at, word in enumerate(line) if is_launch(before[at], word)]

    assert options(line[place + 1 :]) == {"cpu": "-m"}


@pytest.fixture
def launch_with(recipe, cache, tmp_path):
    """A function that runs the recipe by a real launcher: its exit code, and what it says."""

    def launch_with(*words, overrides=(), home=tmp_path / "home"):
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(cache)}
        command = [sys.executable, "-m", "accelerate.commands.launch", *words, "-m", "hfgpt", "train", str(recipe)]
        done = subprocess.run(
            [*command, f"output_dir={recipe.parent / 'out'}", "train.epochs=1", *overrides],
            env={**environment, "HF_HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        return done.returncode, done.stderr

    return launch_with


def configure(path, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_machines": 1, "num_processes": 1}
    path.write_text(yaml.safe_dump({**plain, "mixed_precision": "no", "use_cpu": True, **settings}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mixed_precision", "bf16"], PRECISION),
        (["--gradient_accumulation_steps", "4"], ACCUMULATION),
        (["--dynamo_backend", "eager"], EAGER),
        (["--multi_gpu", "--num_processes", "2", "--gradient_accumulation_steps", "4"], ACCUMULATION),
    ],
)
def test_real_launches_that_ask_for_something_else_are_refused(recipe, launch_with, loop, words, message):
    code, said = launch_with(*words, overrides=[f"loop={loop}"])

    assert code != 0
    assert f"error: {message}" in said
    assert not (recipe.parent / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("is_default", [True, False])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixed_precision": "bf16"}, PRECISION),
        ({"dynamo_config": {"dynamo_backend": "EAGER"}}, EAGER),
    ],
)
def test_real_launches_whose_configuration_file_asks_for_something_else_are_refused(
    recipe, launch_with, tmp_path, is_default, settings, message
):
    path = configure(tmp_path / "home/accelerate/default_config.yaml", **settings)
    words = [] if is_default else ["--config_file", str(path)]

    code, said = launch_with(*words, home=tmp_path / ("home" if is_default else "elsewhere"))

    assert code != 0
    assert f"error: {message}" in said
    assert not (recipe.parent / "out").exists()


@pytest.mark.slow
def test_a_real_launch_that_agrees_with_its_recipe_trains(recipe, launch_with, tmp_path):
    same = ["train.precision=bf16", "train.gradient_accumulation_steps=4"]
    configure(tmp_path / "home/accelerate/default_config.yaml", mixed_precision="bf16")

    code, said = launch_with("--gradient_accumulation_steps", "4", overrides=same)

    assert code == 0, said[-3000:]
    assert (recipe.parent / "out/results.json").is_file()
