import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from accelerate.state import AcceleratorState
from runs import NO_DROPOUT

ENGINES = {
    "ddp": ["--multi_gpu"],
    "fsdp2": ["--config_file", str(Path(__file__).parents[2] / "recipes/accelerate/fsdp2.yaml")],
    "json": ["--use_deepspeed"],  # and a file of DeepSpeed's
    "zero1": ["--use_deepspeed", "--zero_stage", "1"],
    "zero2": ["--use_deepspeed", "--zero_stage", "2"],
    "zero3": ["--use_deepspeed", "--zero_stage", "3"],
}
"""What `accelerate launch` is told for each."""

TEXT_LENGTH = 4900  # leaves a micro-batch of fewer rows, and a last step of fewer micro-batches


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps the precision of a process in a singleton."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def recipe(tmp_path, cache):
    """A recipe of 40 steps on a text that is the same on every machine."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text[:TEXT_LENGTH], encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "output_dir": str(tmp_path / "out"),
                "model": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **NO_DROPOUT},
                "tokenizer": {"vocab_size": 300},
                "data": {"files": str(tmp_path / "text.txt"), "validation_fraction": 0.2, "block_size": 64},
                "optim": {"learning_rate": 3e-3, "warmup_steps": 3},
                "train": {"epochs": 4, "batch_size": 4, "eval_every": 5, "save_every": 4, "keep_last": 20},
                "sample": {"prompt": "The", "max_new_tokens": 8},
            }
        )
    )
    return tmp_path / "recipe.yaml"


@pytest.fixture
def launch(recipe, cache):
    """A function that starts `accelerate launch` with several processes on CPU."""
    started = []

    def launch(name, *overrides, engine="ddp", processes=2, resume=False, words=(), poisoned_step=None):
        environment = {**os.environ, "HF_DATASETS_CACHE": str(cache)}
        program = ["-m", "hfgpt"]
        if engine == "ddp":
            environment["ACCELERATE_USE_CPU"] = "true"
        if engine == "fsdp2":
            environment["PRETEND_GPUS"] = "yes"
        if poisoned_step is not None:
            environment["POISONED_STEP"] = str(poisoned_step)
        if engine == "fsdp2" or poisoned_step is not None or "KILLED_AT_PART" in os.environ:
            program = [str(Path(__file__).with_name("odd_run.py"))]
        command = ["-m", "accelerate.commands.launch", *ENGINES[engine], "--num_processes", str(processes), *words]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", "0", *program, "train", str(recipe), f"output_dir={recipe.parent / name}"]
        with (recipe.parent / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, *command, *overrides, *(["--resume"] if resume else [])],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield launch
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
