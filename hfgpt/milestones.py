"""What happens at certain steps of a run, in either loop: evaluations, samples, checkpoints, and its end."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, set_seed

from hfgpt import checkpoint
from hfgpt.card import CARD_FILE, leave_card
from hfgpt.checkpoint import Position
from hfgpt.data import Rows, eval_loader
from hfgpt.decoding import generate
from hfgpt.disk import make_readable
from hfgpt.evaluation import Score, score_batches
from hfgpt.generation import unknown_ids
from hfgpt.knobs import DROPOUT_FIELDS, RunConfig
from hfgpt.ngram import ngram_perplexities
from hfgpt.nonfinite import refuse_spoilt_weights
from hfgpt.overfitting import best_evaluation, is_patience_spent
from hfgpt.processes import count_parameters, engine, is_split, load_weights, split_again, whole_weights
from hfgpt.recorder import METRICS_FILE, Recorder, refuse_divergence
from hfgpt.results import (
    PLOT_FILE,
    RESULTS_FILE,
    comparable_lines,
    environment,
    peak_memory_bytes,
    plot_losses,
    read_metrics,
    training_speed,
    write_json,
)
from hfgpt.rows import TokenRows
from hfgpt.run import Run, prompt_ids
from hfgpt.speed import matmul_peak, training_flops_per_token
from hfgpt.stopping import Stopped, StopRequest
from hfgpt.text_stream import stream_text
from hfgpt.tokenizer import bytes_of_ids
from hfgpt.trackers import Trackers
from hfgpt.weights import load

SHAPE_FIELDS = (
    *("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "activation_function", "tie_word_embeddings"),
)


def is_due(every: int | str, step: int, run: Run) -> bool:
    """Whether what happens `every` so many steps, or every `epoch`, happens after this step."""
    steps = run.steps_per_epoch if every == "epoch" else int(every)
    return steps > 0 and step % steps == 0


def is_checkpoint_due(step: int, run: Run) -> bool:
    """Whether this step ends with a checkpoint; the last one does, unless the recipe wants none."""
    every = run.config.train.save_every
    return every != 0 and (is_due(every, step, run) or step == run.total_steps)


def is_evaluation_due(step: int, run: Run) -> bool:
    """Whether training evaluates after this step.

    After the last step all rows are scored anyway. With patience the usual rows are scored as well, so that the last
    weights can be compared with the best.
    """
    if step == run.total_steps:
        return run.config.train.patience is not None
    return is_due(run.config.train.eval_every, step, run)


@dataclass(frozen=True)
class Verdict:
    """What the evaluations of a run with patience say.

    Attributes:
        is_best: the newest is the best so far: a checkpoint must keep its weights.
        is_enough: too many in a row were no better: training is over.
    """

    is_best: bool = False
    is_enough: bool = False


def judge(run: Run, recorder: Recorder) -> Verdict:
    """Judge the evaluations so far; every process calls it and hears the same."""
    patience = run.config.train.patience
    if patience is None:
        return Verdict()
    lines = recorder.evaluations
    verdict = Verdict(bool(lines) and best_evaluation(lines) == lines[-1], is_patience_spent(lines, patience))
    return broadcast_object_list([verdict])[0]


def seed_training(config: RunConfig) -> None:
    """Set every random number generator as training starts: each process draws dropout of its own."""
    set_seed(config.seed + PartialState().process_index)


def stopped(run: Run, position: Position) -> Stopped:
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


def evaluate(run: Run, recorder: Recorder, position: Position, limit: int, stop: StopRequest) -> dict[str, Any] | None:
    """Score both splits, write the line and a sample text; every process calls it.

    The training rows are as many as the validation rows, always the same ones, scored in the same way.

    Returns:
        The line of metrics.jsonl, or None if a stop was asked for before there was one.
    """
    recorder.pause()
    try:
        line = score(run, position, limit, stop)
    except Stopped:
        split_again(run.model)
        return None
    record_evaluation(run, recorder, line)
    recorder.resume()
    return line


def record_evaluation(
    run: Run, recorder: Recorder, line: dict[str, Any], comparable: dict[str, Any] | None = None
) -> None:
    """Write an evaluation and a sample text; every process calls it. See `Recorder.evaluation`."""
    is_main = PartialState().is_main_process
    sample = write_sample(run) if is_main or is_split(run.model) else ""
    split_again(run.model)
    if is_main:
        recorder.evaluation(line, sample, comparable)
    PartialState().wait_for_everyone()


def score(run: Run, position: Position, limit: int, stop: StopRequest) -> dict[str, Any]:
    """Score both splits, as `evaluate` does, and write nothing.

    Raises:
        Stopped: a stop was asked for.
    """
    limit = limit or len(run.rows.validation)
    train, validation = (
        score_split(run, rows, min(limit, len(rows)), stop) for rows in (run.rows.train, run.rows.validation)
    )
    refuse_divergence("val_loss", validation.loss, position.step)
    return {
        "step": position.step,
        "tokens": position.tokens,
        "train_loss": train.loss,
        "val_loss": validation.loss,
        "val_perplexity": validation.perplexity,
    }


def write_sample(run: Run) -> str:
    """Write on from the recipe's prompt; drawing from a generator of its own, so that training draws as it would."""
    sample = run.config.sample
    if sample.max_new_tokens == 0:
        return ""
    device = run.model.device
    is_unknown = unknown_ids(run.tokenizer, run.model.config.vocab_size)
    ids = generate(
        run.model,
        prompt_ids(run.config, run.tokenizer).to(device),
        max_new_tokens=sample.max_new_tokens,
        temperature=sample.temperature,
        top_k=sample.top_k,
        eos_token_id=run.tokenizer.eos_token_id,
        is_unknown=None if is_unknown is None else is_unknown.to(device),
        generator=torch.Generator(device).manual_seed(run.config.seed),
    )
    return "".join(stream_text(run.tokenizer, ids[0]))


def save_checkpoint(
    run: Run, recorder: Recorder, position: Position, states: dict[str, Any], val_loss: float | None
) -> None:
    """Write a checkpoint that is also a model folder; every process calls it.

    Raises:
        FloatingPointError: a weight is no number; the checkpoints before this one stay.
    """
    refuse_spoilt_weights(run.model, position.step)

    def write(folder: Path) -> None:
        save_model(run, folder)
        # Where transformers' Trainer reads its place from, and what it compares with its arguments.
        place = {"global_step": position.step, "epoch": position.epoch, "train_batch_size": run.config.train.batch_size}
        if PartialState().is_main_process:
            write_json(folder / "trainer_state.json", place)

    recorder.pause()
    manifest = checkpoint.Manifest(position, run.identity, val_loss)
    checkpoint.save_checkpoint(run.folder, manifest, write, states, run.config.train.keep_last, run.rows.stream)
    recorder.resume()


def save_model(run: Run, folder: Path) -> None:
    """Save weights, config, code and tokenizer: what AutoModel and AutoTokenizer load; every process calls it."""
    is_main = PartialState().is_main_process
    weights = whole_weights(run.model)
    # Where transformers has split it, all put it together, and the first one writes.
    if is_main or (weights is None and is_split(run.model)):
        run.model.save_pretrained(folder, state_dict=weights)
    if is_main:
        run.tokenizer.save_pretrained(folder)
        for path in folder.glob("*.safetensors"):
            make_readable(path)


def score_ngrams(rows: Rows, vocab_size: int) -> dict[str, float]:
    """Perplexities of n-gram models of the training rows on the validation rows; none of a stream, never seen whole."""
    if rows.stream is not None:
        return {}
    baselines = ngram_perplexities(rows.train.pairs(), rows.validation.pairs(), vocab_size)
    return {"unigram": baselines.unigram, "bigram": baselines.bigram}


def finish_run(run: Run, recorder: Recorder, position: Position, stop: StopRequest) -> dict[str, Any]:
    """Score all rows, save the model and leave results.json, loss.png, README.md and the rest; every process calls it.

    Args:
        run: the run, trained.
        recorder: its records.
        position: where training ended.
        stop: asked for in the middle, it leaves the end for another time.

    Returns:
        What results.json holds.

    Raises:
        Stopped: a stop was asked for.
    """
    is_best_wanted = run.config.train.patience is not None
    trained, last_step = position, position.step
    if is_best_wanted:
        position = restore_best(run, recorder)
    try:
        line = score(run, position, limit=0, stop=stop)
        # Compared with the other evaluations on their rows, not on all.
        limit = run.config.train.eval_rows
        is_same = not limit or limit >= len(run.rows.validation)
        comparable = line if is_same else score(run, position, limit, stop)
    except Stopped:
        raise stopped(run, trained) from None
    refuse_spoilt_weights(run.model, position.step)
    if is_best_wanted:
        split_again(run.model)
    else:  # with the best weights the lines would go back to an earlier step
        record_evaluation(run, recorder, line, comparable)
    results: dict[str, Any] = {}
    save_model(run, run.folder)
    if PartialState().is_main_process:
        best = best_evaluation([*recorder.evaluations, comparable])
        assert best is not None
        baselines = score_ngrams(run.rows, run.model.config.vocab_size)
        metrics = read_metrics(run.folder / METRICS_FILE)
        targets = run.rows.validation.pairs()[:, 1]
        results = {
            **line,
            "loss_gap": line["val_loss"] - line["train_loss"],
            "last_step": last_step,
            "best_step": best["step"],
            "best_val_loss": best["val_loss"],
            "eval_rows_train_loss": comparable["train_loss"],
            "eval_rows_val_loss": comparable["val_loss"],
            "skipped_steps": sum("skipped" in each for each in metrics),
            "bits_per_byte": bits_per_byte(line["val_loss"], targets, bytes_of_ids(run.tokenizer)),
            **{f"{name}_perplexity": perplexity for name, perplexity in baselines.items()},
            "parameters": count_parameters(run.model),
            **({"train_tokens": run.rows.train_counts.tokens} if run.rows.stream is None else {}),
            "validation_tokens": run.rows.validation_counts.tokens,
            "checks": next((each["checks"] for each in metrics if "checks" in each), None),
            "matmul_peak": matmul_peak(PartialState().device, run.config.train.precision),
            "peak_memory_bytes": peak_memory_bytes(),
            "tokens_per_second": training_speed(metrics),
            "elapsed_seconds": recorder.elapsed_seconds(),
            "run": describe_run(run, position),
            "samples": [{"step": step, "text": text} for step, text in progress(recorder.samples.read())],
            "card": {"license": None, "language": "en" if run.config.data.source == "pydoc" else None, "repo_id": None},
            "verified": None,
            "environment": {**environment(), "processes": PartialState().num_processes, "engine": engine(run.model)},
        }
        plot_losses(
            comparable_lines(metrics, results),
            run.folder / PLOT_FILE,
            baselines=baselines,
            best_step=best["step"],
            final_val_loss=None if is_same or is_best_wanted else line["val_loss"],
        )
        say_what_is_kept(recorder, best, comparable, last_step)
        if not leave_card(run.folder, results):
            recorder.say(f"{run.folder / CARD_FILE} is left as it is: hfgpt did not write it.")
        write_json(run.folder / RESULTS_FILE, results)  # last: its presence says that the run is finished
    PartialState().wait_for_everyone()
    return results


def restore_best(run: Run, recorder: Recorder) -> Position:
    """Give the model the weights of its best checkpoint, and say where that stands; every process calls it.

    Raises:
        ValueError: that checkpoint is damaged.
    """
    best = checkpoint.best_checkpoint(run.folder)
    line = broadcast_object_list([best_evaluation(recorder.evaluations)])[0]  # non-main processes have none
    if best is None or best.name != f"checkpoint-{line['step']}":
        raise ValueError(
            f"{run.folder} has lost checkpoint-{line['step']}, that of its best evaluation. Train in another folder."
        )
    manifest = checkpoint.verify_checkpoint(best)
    load_weights(run.model, load(best).state_dict())
    return manifest.position


def say_what_is_kept(recorder: Recorder, best: dict[str, Any], comparable: dict[str, Any], last_step: int) -> None:
    """Say which weights the folder holds, where those are not the best and the last at once.

    Args:
        recorder: says it, and knows the evaluations.
        best: the best evaluation.
        comparable: that of the weights that the folder holds, on the same rows.
        last_step: where training ended.
    """
    lowest = f"the validation loss was lowest at step {best['step']} of {last_step} ({best['val_loss']:.3f}"
    if comparable["step"] < last_step:
        recorder.say(f"{lowest}); the folder holds those weights")
    elif best["step"] < last_step:
        recorder.say(
            f"{lowest}, and {comparable['val_loss']:.3f} at the end): the model has begun to learn its text by heart. "
            "The folder holds the last weights; `train.patience` stops in time and keeps the best"
        )
    start = next((line["val_loss"] for line in recorder.evaluations if line["step"] == 0), None)
    if start is not None and best["val_loss"] >= start:
        recorder.say(f"no evaluation was better than the one before training ({start:.3f})")


def describe_run(run: Run, position: Position) -> dict[str, Any]:
    """What was trained, on what and how, as results.json says it: no path of this machine, nothing that was measured.

    It is the same in both loops, and for a run that was interrupted.
    """
    config, model = run.config, run.model.config
    is_pydoc = config.data.source == "pydoc"
    tokenizer = config.tokenizer.name or config.init_from
    return {
        **starting_point(config.init_from, "base_model"),
        "seed": config.seed,
        "model": {name: getattr(model, name) for name in (*SHAPE_FIELDS, *DROPOUT_FIELDS)},
        "tokenizer": {
            **starting_point(tokenizer, "name"),
            "vocab_size": len(run.tokenizer),
            "sha256": run.identity["tokenizer"],
        },
        "data": {
            "source": "pydoc" if is_pydoc else None,
            "hub_id": None if is_pydoc else starting_point(config.data.source, "hub_id")["hub_id"],
            **{name: getattr(config.data, name) for name in ("name", "split", "validation_split")},
            **{name: getattr(config.data, name) for name in ("block_size", "stride", "packing")},
            "streaming": config.data.streaming,
            "train_sha256": None if config.data.streaming else run.identity["training rows"],
            "validation_sha256": run.identity["validation rows"],
        },
        "optim": asdict(config.optim),
        "train": {
            "rows_per_step": run.identity["number of rows per step"],
            "epochs": None if config.data.streaming else position.epoch + position.rows / len(run.rows.train),
            "precision": config.train.precision,
        },
        "sample": asdict(config.sample),
    }


def starting_point(name: str | None, key: str) -> dict[str, str | None]:
    """Where something comes from, nothing, a folder of this machine, which is not named, or the Hub."""
    kind = "nothing" if name is None else "folder" if Path(name).exists() else "hub"
    return {"starts_from": kind, key: name if kind == "hub" else None}


def progress(samples: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Of the samples of a run its first after training began, one from its middle, and its last."""
    trained = [sample for sample in samples if sample[0] > 0]
    return [trained[index] for index in sorted({(len(trained) - 1) * part // 2 for part in range(3)}) if trained]


def bits_per_byte(loss: float, targets: np.ndarray, lengths: np.ndarray | None) -> float | None:
    """A loss per byte of text, which models with other tokenizers can be compared by.

    Args:
        loss: nats per token, the mean over `targets`.
        targets: (N,) token ids; those that stand for no text count with their loss.
        lengths: bytes that each id stands for, or None if nobody knows.
    """
    num_bytes = 0 if lengths is None else int(lengths[targets].sum())
    return loss * len(targets) / math.log(2) / num_bytes if num_bytes else None
