"""What a run saves while it trains: checkpoints that are also model folders."""

from pathlib import Path
from typing import Any

from accelerate import PartialState

from hfgpt.data.tokenizer import save_tokenizer
from hfgpt.distributed.sharding import gather_full_state_dict, is_sharded
from hfgpt.system.storage import make_readable, write_json
from hfgpt.training import checkpoint
from hfgpt.training.checkpoint import TrainState
from hfgpt.training.nonfinite import check_finite_weights
from hfgpt.training.recorder import Recorder
from hfgpt.training.run import Run


def save_checkpoint(
    run: Run, recorder: Recorder, state: TrainState, states: dict[str, Any], val_loss: float | None
) -> None:
    """Write a checkpoint that is also a model folder; every process calls it.

    Raises:
        FloatingPointError: a weight is no number; the checkpoints before this one stay.
    """
    check_finite_weights(run.model, state.step)

    def write(folder: Path) -> None:
        save_model(run, folder)
        # Where transformers' Trainer reads its place from, and what it compares with its arguments.
        place = {"global_step": state.step, "epoch": state.epoch, "train_batch_size": run.config.train.batch_size}
        if PartialState().is_main_process:
            write_json(folder / "trainer_state.json", place)

    recorder.pause()
    manifest = checkpoint.Manifest(state, run.identity, val_loss, run.origins, bool(run.is_compiled))
    checkpoint.save_checkpoint(run.folder, manifest, write, states, run.config.train.keep_last, run.rows.streamed)
    recorder.resume()


def save_model(run: Run, folder: Path) -> None:
    """Save weights, config, code and tokenizer: what AutoModel and AutoTokenizer load; every process calls it."""
    is_main = PartialState().is_main_process
    weights = gather_full_state_dict(run.model)
    # Where transformers has split it, all put it together, and the first one writes.
    if is_main or (weights is None and is_sharded(run.model)):
        run.model.save_pretrained(folder, state_dict=weights)
    if is_main:
        save_tokenizer(run.tokenizer, folder, run.model.config.vocab_size)
        for path in folder.glob("*.safetensors"):
            make_readable(path)
