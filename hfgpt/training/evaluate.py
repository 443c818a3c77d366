"""What happens at certain steps of a run, in either loop: evaluations, samples, checkpoints."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, set_seed

from hfgpt.config.schema import RunConfig
from hfgpt.data.loaders import eval_loader
from hfgpt.data.prepare import Rows
from hfgpt.data.rows import TokenRows
from hfgpt.distributed.sharding import count_parameters, is_sharded, reshard
from hfgpt.evaluation.loss import Score, score_batches
from hfgpt.generation.decoding import generate
from hfgpt.generation.generator import suppressed_ids
from hfgpt.generation.params import SamplingParams
from hfgpt.generation.streamer import stream_text
from hfgpt.system.machine import matmul_peak, training_flops_per_token
from hfgpt.training import checkpoint
from hfgpt.training.checkpoint import TrainState
from hfgpt.training.recorder import Recorder, check_finite_loss
from hfgpt.training.run import Run, prompt_ids
from hfgpt.training.signals import Stopped, StopRequest
from hfgpt.training.trackers import Trackers


def is_due(every: int | str, step: int, run: Run) -> bool:
    """Whether what happens `every` so many steps, or every `epoch`, happens after this step."""
    steps = run.steps_per_epoch if every == "epoch" else int(every)
    return steps > 0 and step % steps == 0


def is_evaluation_due(step: int, run: Run) -> bool:
    """Whether training evaluates after this step.

    After the last step all rows are scored anyway. With patience the usual rows are scored as well, so that the last
    weights can be compared with the best.
    """
    if step == run.total_steps:
        return run.config.train.patience is not None
    return is_due(run.config.train.eval_every, step, run)


def seed_training(config: RunConfig) -> None:
    """Set every random number generator as training starts: each process draws dropout of its own."""
    set_seed(config.seed + PartialState().process_index)


def stopped(run: Run, position: TrainState) -> Stopped:
    """What to raise when a run stops because it was asked to."""
    newest = next(iter(checkpoint.checkpoints(run.folder)), None)
    where = "It has no checkpoint and starts again" if newest is None else f"It goes on from {newest.name}"
    return Stopped(f"stopped at step {position.step} of {run.total_steps}, as asked. {where} with `--resume`.")


def is_evaluation_missing(run: Run, recorder: Recorder) -> bool:
    """Whether a run has to be evaluated where it starts or goes on: a stop can come between a step and that."""
    step = run.position.step
    is_wanted = step == 0 or is_evaluation_due(step, run)
    answer = [is_wanted and not (recorder.speaks and recorder.has_evaluation(step))]
    return bool(broadcast_object_list(answer)[0])


def catch_up(run: Run, recorder: Recorder, stop: StopRequest) -> None:
    """Evaluate where training starts or goes on, if that is missing; every process calls it.

    Raises:
        Stopped: a stop was asked for.
    """
    if not is_evaluation_missing(run, recorder):
        return
    line = evaluate(run, recorder, run.position, run.config.train.eval_rows, stop)
    if line is None:
        raise stopped(run, run.position)
    if run.resume_from is not None and PartialState().is_main_process:
        checkpoint.record_score(run.resume_from, line["val_loss"])  # as if it had been there when it was written


def make_recorder(run: Run, started_at: float) -> Recorder:
    """Open the run's records where training starts: a resumed run drops the lines that it will write again.

    Args:
        run: the run.
        started_at: `time.perf_counter()` when this process began with it.
    """
    config, process = run.config, PartialState()
    peak = matmul_peak(process.device, config.train.precision)
    recorder = Recorder(
        folder=run.folder,
        total_steps=run.total_steps,
        prompt=config.sample.prompt,
        settings={name: getattr(config.sample, name) for name in ("max_new_tokens", "temperature", "top_k")},
        start=run.position,
        started_at=started_at,
        peak_tokens_per_second=process.num_processes
        * peak
        / training_flops_per_token(run.model, config.data.block_size),
        trackers=Trackers(config, run.folder, run.position.step) if process.is_main_process else None,
    )
    recorder.say(f"{count_parameters(run.model):,} parameters, {len(run.tokenizer):,} token ids; {describe(run.rows)}")
    if run.resume_from is not None:
        recorder.say(f"going on from {run.resume_from} at step {run.position.step}")
    return recorder


def describe(rows: Rows) -> str:
    """How much text there is."""
    train, validation = (
        f"{name} {count.tokens:,} tokens in {len(part):,} rows, {count.remainder} left over"
        for name, count, part in (
            ("train", rows.train_counts, rows.train),
            ("validation", rows.validation_counts, rows.validation),
        )
    )
    return f"train from a stream; {validation}" if rows.stream is not None else f"{train}; {validation}"


def score_split(run: Run, rows: TokenRows, limit: int, stop: StopRequest) -> Score:
    """Score the first `limit` rows of a split, or all of them if `limit` is 0, on all processes together.

    Raises:
        Stopped: a stop was asked for.
    """
    process = PartialState()
    chosen = rows.first(limit or len(rows))
    loader = eval_loader(chosen, run.config.train.batch_size, process.process_index, process.num_processes)

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


def evaluate(
    run: Run, recorder: Recorder, position: TrainState, limit: int, stop: StopRequest
) -> dict[str, Any] | None:
    """Score both splits, write the line and a sample text; every process calls it.

    The training rows are as many as the validation rows, always the same ones, scored in the same way.

    Returns:
        The line of metrics.jsonl, or None if a stop was asked for before there was one.
    """
    recorder.pause()
    try:
        line = score(run, position, limit, stop)
    except Stopped:
        reshard(run.model)
        return None
    record_evaluation(run, recorder, line)
    recorder.resume()
    return line


def record_evaluation(
    run: Run, recorder: Recorder, line: dict[str, Any], comparable: dict[str, Any] | None = None
) -> None:
    """Write an evaluation and a sample text; every process calls it. See `Recorder.evaluation`."""
    is_main = PartialState().is_main_process
    sample = write_sample(run) if is_main or is_sharded(run.model) else ""
    reshard(run.model)
    if is_main:
        recorder.evaluation(line, sample, comparable)
    PartialState().wait_for_everyone()


def score(run: Run, position: TrainState, limit: int, stop: StopRequest) -> dict[str, Any]:
    """Score both splits, as `evaluate` does, and write nothing.

    Raises:
        Stopped: a stop was asked for.
    """
    limit = limit or len(run.rows.validation)
    train, validation = (
        score_split(run, rows, min(limit, len(rows)), stop) for rows in (run.rows.train, run.rows.validation)
    )
    check_finite_loss("val_loss", validation.loss, position.step)
    return {
        "step": position.step,
        "tokens": position.tokens,
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
