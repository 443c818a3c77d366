from pathlib import Path

import datasets
import pytest
import yaml
from accelerate.state import AcceleratorState
from runs import NO_DROPOUT

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
