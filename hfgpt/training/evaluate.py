"""Evaluations: both splits scored, a line of metrics.jsonl, and a sample text."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hfgpt.data.loaders import eval_loader
from hfgpt.data.rows import TokenRows
from hfgpt.distributed.sharding import is_sharded, reshard
from hfgpt.evaluation.loss import Score, score_batches
from hfgpt.generation.decoding import generate
from hfgpt.generation.generator import suppressed_ids
from hfgpt.generation.params import SamplingParams
from hfgpt.generation.streamer import stream_text
from hfgpt.results.records import MetricsLog
from hfgpt.training.checkpoint import TrainState
from hfgpt.training.recorder import Recorder, check_finite_loss
from hfgpt.training.run import Run, prompt_ids
from hfgpt.training.signals import Stopped, StopRequest

PART_ROWS = 128
"""Rows, about, that are scored at a time: so many are lost when a run is killed while it scores."""


class PartialScores:
    """Scores of parts of the rows, each made once; with a file, a run that is stopped or killed goes on with them.

    Args:
        path: where they are kept, or None: in memory only.
        step: of the weights that are scored.
    """

    def __init__(self, path: Path | None = None, step: int = 0) -> None:
        self.step, self.log, lines = step, None, []
        if path is not None and PartialState().is_main_process:
            self.log = MetricsLog(path)
            self.log.truncate_after(step)  # a last line that a kill has torn
            lines = self.log.read()
        self.scores = {
            (line["split"], line["start"], line["stop"]): Score(line["tokens"], line["total"])
            for line in broadcast_object_list([lines])[0]
            if line["step"] == step
        }

    @property
    def rows(self) -> int:
        """Rows that are scored."""
        return sum(stop - start for _, start, stop in self.scores)

    def add(self, split: str, start: int, stop: int, score: Score) -> None:
        """Keep the score of the rows from `start` to before `stop` of a split."""
        self.scores[split, start, stop] = score
        if self.log is not None:
            part = {"split": split, "start": start, "stop": stop, "tokens": score.tokens, "total": score.total}
            self.log.write({"step": self.step, **part})


def score_rows(run: Run, rows: TokenRows, stop: StopRequest, show: Callable[[int], None] = lambda rows: None) -> Score:
    """Score rows on all processes together; `show` is called with the number of those that are done.

    Raises:
        Stopped: a stop was asked for.
    """
    process = PartialState()
    loader = eval_loader(rows, run.config.train.batch_size, process.process_index, process.num_processes)

    def until_stopped() -> Iterator[dict[str, torch.Tensor]]:
        for number, batch in enumerate(loader, start=1):
            if stop.is_made():
                raise Stopped
            yield batch
            show(min(number * run.global_batch, len(rows)))

    # In the run's precision wherever it is asked for: before training the model is not prepared for it yet.
    precision = run.config.train.precision
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(process.device.type, dtype, enabled=precision != "fp32"):
        return score_batches(run.model, until_stopped())


def score(
    run: Run, recorder: Recorder, state: TrainState, limit: int, stop: StopRequest, done: PartialScores
) -> dict[str, Any]:
    """Score the first rows of both splits, in parts that are the same whatever `limit` is; every process calls it.

    Args:
        run: its model is scored.
        recorder: shows how far it is, once its `begin_scoring` was called.
        state: where training stands.
        limit: rows of each split, at most.
        stop: looked at between batches.
        done: parts that are scored already; the others are added.

    Returns:
        A line for metrics.jsonl.

    Raises:
        Stopped: a stop was asked for.
        FloatingPointError: the validation loss is not finite.
    """
    losses = {}
    for split, rows in (("train", run.rows.train), ("validation", run.rows.validation)):
        total = Score(0, 0.0)
        for begin, end in part_bounds(run, min(limit, len(rows))):
            if (split, begin, end) not in done.scores:

                def show(rows: int, before: int = done.rows) -> None:
                    recorder.show_scored(before + rows)

                part = score_rows(run, rows.part(begin, end), stop, show)
                done.add(split, begin, end, part)
            total += done.scores[split, begin, end]
        losses[split] = total
    validation = losses["validation"]
    check_finite_loss("val_loss", validation.loss, state.step)
    return {
        "step": state.step,
        "tokens": state.tokens,
        "train_loss": losses["train"].loss,
        "val_loss": validation.loss,
        "val_perplexity": validation.perplexity,
    }


def part_bounds(run: Run, count: int) -> Iterator[tuple[int, int]]:
    """Where the parts of the first `count` rows begin and end; those of `train.eval_rows` are whole parts."""
    size = math.ceil(PART_ROWS / run.global_batch) * run.global_batch
    return pairwise(sorted({*range(0, count, size), min(run.config.train.eval_rows, count), count}))


def evaluate(run: Run, recorder: Recorder, state: TrainState, stop: StopRequest) -> dict[str, Any] | None:
    """Score `train.eval_rows` of both splits, write the line and a sample text; every process calls it.

    Returns:
        The line of metrics.jsonl, or None if a stop was asked for before there was one.
    """
    recorder.pause()
    limit = run.config.train.eval_rows or len(run.rows.validation)
    recorder.begin_scoring(0, sum(min(limit, len(rows)) for rows in (run.rows.train, run.rows.validation)))
    try:
        line = score(run, recorder, state, limit, stop, PartialScores())
    except Stopped:
        reshard(run.model)
        return None
    record_evaluation(run, recorder, line)
    recorder.resume()
    return line


def record_evaluation(
    run: Run, recorder: Recorder, line: dict[str, Any], comparable: dict[str, Any] | None = None, scope: str = ""
) -> None:
    """Write an evaluation and a sample text, see `Recorder.log_evaluation`; every process calls it."""
    is_main = PartialState().is_main_process
    sample = write_sample(run) if is_main or is_sharded(run.model) else ""
    reshard(run.model)
    if is_main:
        recorder.log_evaluation(line, sample, comparable, scope)
    PartialState().wait_for_everyone()


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
