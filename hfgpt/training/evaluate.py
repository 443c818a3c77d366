"""Evaluations: both splits scored, a line of metrics.jsonl, and a sample text."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState

from hfgpt.data.loaders import eval_loader
from hfgpt.data.rows import TokenRows
from hfgpt.distributed.sharding import is_sharded, reshard
from hfgpt.evaluation.loss import Score, score_batches
from hfgpt.generation.decoding import generate
from hfgpt.generation.generator import suppressed_ids
from hfgpt.generation.params import SamplingParams
from hfgpt.generation.streamer import stream_text
from hfgpt.training.checkpoint import TrainState
from hfgpt.training.recorder import Recorder, check_finite_loss
from hfgpt.training.run import Run, prompt_ids
from hfgpt.training.signals import Stopped, StopRequest


def score_rows(run: Run, rows: TokenRows, stop: StopRequest) -> Score:
    """Score rows on all processes together.

    Raises:
        Stopped: a stop was asked for.
    """
    process = PartialState()
    loader = eval_loader(rows, run.config.train.batch_size, process.process_index, process.num_processes)

    def until_stopped() -> Iterator[dict[str, torch.Tensor]]:
        for batch in loader:
            if stop.is_made():
                raise Stopped
            yield batch

    # In the run's precision wherever it is asked for: before training the model is not prepared for it yet.
    precision = run.config.train.precision
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(process.device.type, dtype, enabled=precision != "fp32"):
        return score_batches(run.model, until_stopped())


def evaluate(run: Run, recorder: Recorder, state: TrainState, stop: StopRequest) -> dict[str, Any] | None:
    """Score `train.eval_rows` of both splits, write the line and a sample text; every process calls it.

    Returns:
        The line of metrics.jsonl, or None if a stop was asked for before there was one.
    """
    recorder.pause()
    try:
        line = score(run, state, run.config.train.eval_rows, stop)
    except Stopped:
        reshard(run.model)
        return None
    record_evaluation(run, recorder, line)
    recorder.resume()
    return line


def record_evaluation(
    run: Run, recorder: Recorder, line: dict[str, Any], comparable: dict[str, Any] | None = None
) -> None:
    """Write an evaluation and a sample text, see `Recorder.log_evaluation`; every process calls it."""
    is_main = PartialState().is_main_process
    sample = write_sample(run) if is_main or is_sharded(run.model) else ""
    reshard(run.model)
    if is_main:
        recorder.log_evaluation(line, sample, comparable)
    PartialState().wait_for_everyone()


def score(run: Run, state: TrainState, limit: int, stop: StopRequest) -> dict[str, Any]:
    """Score the first rows of both splits; every process calls it.

    Args:
        run: its model is scored.
        state: where training stands.
        limit: rows of each split; 0 takes all validation rows, and as many training rows.
        stop: looked at between batches.

    Returns:
        A line for metrics.jsonl.

    Raises:
        Stopped: a stop was asked for.
        FloatingPointError: the validation loss is not finite.
    """
    count = limit or len(run.rows.validation)
    train, validation = (score_rows(run, rows.first(count), stop) for rows in (run.rows.train, run.rows.validation))
    check_finite_loss("val_loss", validation.loss, state.step)
    return {
        "step": state.step,
        "tokens": state.tokens,
        "train_loss": train.loss,
        "val_loss": validation.loss,
        "val_perplexity": validation.perplexity,
    }


def write_sample(run: Run) -> str:
    """Continue the recipe's prompt, with a random generator of its own, so that training draws what it would."""
    sample = run.config.sample
    if sample.max_new_tokens == 0:
        return ""
    params = SamplingParams(
        max_new_tokens=sample.max_new_tokens, temperature=sample.temperature, top_k=sample.top_k, seed=run.config.seed
    )
    ids = generate(
        run.model,
        prompt_ids(run.config, run.tokenizer).to(run.model.device),
        params,
        eos_token_id=run.tokenizer.eos_token_id,
        suppress_mask=suppressed_ids(run.tokenizer, run.model),
    )
    return "".join(stream_text(run.tokenizer, ids[0]))
