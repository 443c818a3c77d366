"""The end of a run: the model saved, many rows scored, and results.json and the card written."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import NanoChatConfig

from hfgpt.config.schema import DROPOUT_FIELDS, NANOCHAT_FIELDS, TOKENIZER_FIELDS
from hfgpt.data.prepare import Rows
from hfgpt.data.tokenizer import bytes_of_ids
from hfgpt.distributed.sharding import count_parameters, engine, load_weights, reshard
from hfgpt.evaluation.ngram import ngram_perplexities
from hfgpt.results.advice import advise
from hfgpt.results.card import CARD_FILE, leave_card
from hfgpt.results.plots import plot_losses
from hfgpt.results.records import (
    PLOT_FILE,
    RESULTS_FILE,
    best_evaluation,
    comparable_lines,
    read_metrics,
    training_speed,
)
from hfgpt.system.machine import environment, peak_memory_bytes
from hfgpt.system.storage import write_json
from hfgpt.training import checkpoint
from hfgpt.training.checkpoint import TrainState
from hfgpt.training.control import TrainingControl
from hfgpt.training.evaluate import PartialScores, record_evaluation, score
from hfgpt.training.nonfinite import check_finite_weights
from hfgpt.training.recorder import METRICS_FILE, Recorder
from hfgpt.training.run import Run, load_model, origin
from hfgpt.training.saving import save_model
from hfgpt.training.signals import Stopped
from hfgpt.weights.model_parts import Config

SCORES_FILE = "final_scores.jsonl"
NGRAMS = ("unigram", "bigram")

SHAPE_FIELDS = (
    *("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "activation_function", "tie_word_embeddings"),
)


def finish_run(control: TrainingControl) -> dict[str, Any]:
    """Save the model, score it, and leave results.json, loss.png, README.md and the rest; every process calls it.

    The weights come first, because scoring may take long: what ends the run meanwhile leaves a folder that loads.

    Returns:
        What results.json holds, on the main process; an empty dict on others.

    Raises:
        Stopped: a stop was asked for.
    """
    run, recorder = control.run, control.recorder
    keeps_best = run.config.train.patience is not None
    state = restore_best(run, recorder) if keeps_best else control.state
    check_finite_weights(run.model, state.step)
    save_model(run, run.folder)
    line, comparable = score_finally(control, state)
    is_same, scope = line == comparable, describe_scope(run)
    if keeps_best:
        reshard(run.model)
    else:  # with the best weights the lines would go back to an earlier step
        record_evaluation(run, recorder, line, comparable, "" if is_same else scope)
    results: dict[str, Any] = {}
    if PartialState().is_main_process:
        metrics = read_metrics(run.folder / METRICS_FILE)
        summary = summarize(run, recorder, state, line, comparable, metrics)
        results = {**line, "last_step": control.state.step, **summary}
        plot_losses(
            comparable_lines(metrics, results),
            run.folder / PLOT_FILE,
            baselines={name: results[f"{name}_perplexity"] for name in NGRAMS if run.rows.streamed is None},
            best_step=results["best_step"],
            final=None if is_same or keeps_best else (scope, line["val_loss"]),
        )
        for text in advise(results, recorder.evaluations):
            recorder.print_status(text)
        if not leave_card(run.folder, results):
            recorder.print_status(f"{run.folder / CARD_FILE} is left as it is: hfgpt did not write it.")
        scores_path(control).unlink(missing_ok=True)
        write_json(run.folder / RESULTS_FILE, results)  # last: its presence says that the run is finished
    PartialState().wait_for_everyone()
    return results


def score_finally(control: TrainingControl, state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """Score `train.final_eval_rows` of both splits, going on where a process before this one was ended.

    Returns:
        The evaluation, and the same on the rows of all others, which are its first.

    Raises:
        Stopped: a stop was asked for.
    """
    run, recorder = control.run, control.recorder
    path = scores_path(control)
    done = PartialScores(path if path.parent.is_dir() else None, state.step)
    rows = sum(min(run.final_rows, len(rows)) for rows in (run.rows.train, run.rows.validation))
    begun = f", of which {done.rows:,} are done" if done.rows else ""
    recorder.print_status(f"the weights of step {state.step} are in {run.folder}; scoring {rows:,} rows{begun}")
    recorder.begin_scoring(done.rows, rows)
    try:
        comparable = score(
            run, recorder, state, min(run.config.train.eval_rows or run.final_rows, run.final_rows), control.stop, done
        )
        return score(run, recorder, state, run.final_rows, control.stop, done), comparable
    except Stopped:
        control.save_last_step()
        raise control.stopped(f" The trained weights are in {run.folder}.") from None


def scores_path(control: TrainingControl) -> Path:
    """Where the scores of parts of the rows are kept: with the last weights, so that they go where these go."""
    return control.run.folder / f"checkpoint-{control.state.step}" / SCORES_FILE


def describe_scope(run: Run) -> str:
    """How many validation rows are scored at the end, in words."""
    count, there = run.final_rows, len(run.rows.validation)
    return "all validation rows" if count == there else f"{count:,} of {there:,} validation rows"


def summarize(
    run: Run,
    recorder: Recorder,
    state: TrainState,
    line: dict[str, Any],
    comparable: dict[str, Any],
    metrics: list[dict[str, Any]],
) -> dict[str, Any]:
    """What results.json holds besides `line`, the evaluation at the end of the weights that are kept.

    `state` is where training stood when it had them; `comparable` their evaluation on the rows of all others.
    """
    best = best_evaluation([*recorder.evaluations, comparable])
    assert best is not None
    scored = replace(run.rows, validation=run.rows.validation.part(0, run.final_rows))
    targets, validation = scored.validation.pairs()[:, 1], run.rows.validation_counts
    return {
        "loss_gap": line["val_loss"] - line["train_loss"],
        "best_step": best["step"],
        "best_val_loss": best["val_loss"],
        "eval_rows_train_loss": comparable["train_loss"],
        "eval_rows_val_loss": comparable["val_loss"],
        "skipped_steps": sum("skipped" in each for each in metrics),
        "unknown_share": validation.unknown_share,
        # Of text that the ids do not determine they would be those of another text.
        "bits_per_byte": None
        if validation.loss_of_text
        else bits_per_byte(line["val_loss"], targets, bytes_of_ids(run.tokenizer)),
        **score_ngrams(scored, run.model.config.vocab_size),
        "parameters": count_parameters(run.model),
        **({"train_tokens": run.rows.train_counts.tokens} if run.rows.streamed is None else {}),
        "validation_tokens": validation.tokens,
        "validation_rows": len(run.rows.validation),
        "scored_validation_rows": run.final_rows,  # the first ones
        "checks": next((each["checks"] for each in metrics if "checks" in each), None),
        "peak_memory_bytes": peak_memory_bytes(),
        "tokens_per_second": training_speed(metrics),
        "elapsed_seconds": recorder.elapsed_seconds(),
        "run": describe_run(run, state),
        "samples": [{"step": step, "text": text} for step, text in progress(recorder.samples.read())],
        "card": {"license": None, "language": "en" if run.config.data.source == "pydoc" else None, "repo_id": None},
        "verified": None,
        "environment": {**environment(), "processes": PartialState().num_processes, "engine": engine(run.model)},
    }


def score_ngrams(rows: Rows, vocab_size: int) -> dict[str, float]:
    """Perplexities of n-gram models of the training rows on the validation rows; none of a stream, never seen whole."""
    if rows.streamed is not None:
        return {}
    baselines = ngram_perplexities(rows.train.pairs(), rows.validation.pairs(), vocab_size)
    return {f"{name}_perplexity": getattr(baselines, name) for name in NGRAMS}


def restore_best(run: Run, recorder: Recorder) -> TrainState:
    """Give the model the weights of its best checkpoint, and return where it stood; every process calls it.

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
    load_weights(run.model, load_model(run.config, best).state_dict())
    return manifest.state


def describe_run(run: Run, state: TrainState) -> dict[str, Any]:
    """What was trained, on what and how, for results.json: no path of this machine, nothing that was measured.

    It is the same in both loops, and for a run that was interrupted.
    """
    config, model = run.config, run.model.config
    is_pydoc = config.data.source == "pydoc"
    return {
        **describe_origin(run.origins["model"], config.init_from, "base_model"),
        "seed": config.seed,
        **({"model_class": type(run.model).__name__} if config.model_class else {}),
        "model": describe_own_model(model) if config.model_class else describe_model(model),
        "tokenizer": {
            **describe_origin(run.origins["tokenizer"], config.tokenizer.name or config.init_from, "name"),
            "vocab_size": len(run.tokenizer),
            "sha256": run.identity["tokenizer"],
        },
        "data": {
            "source": "pydoc" if is_pydoc else None,
            "hub_id": config.data.source if not is_pydoc and origin(config.data.source) == "hub" else None,
            **{name: getattr(config.data, name) for name in ("name", "split", "validation_split")},
            **{name: getattr(config.data, name) for name in ("block_size", "stride", "packing")},
            "streaming": config.data.streaming,
            "train_sha256": None if config.data.streaming else run.identity["training rows"],
            "validation_sha256": run.identity["validation rows"],
        },
        "optim": asdict(run.optim),
        "train": {
            "rows_per_step": run.identity["number of rows per step"],
            "epochs": None if config.data.streaming else state.epoch + state.rows / len(run.rows.train),
            "precision": config.train.precision,
        },
        "sample": asdict(config.sample),
    }


def describe_model(config: Config) -> dict[str, Any]:
    """The architecture, the shape and the dropouts of a model."""
    is_nanochat = isinstance(config, NanoChatConfig)
    names = dict.fromkeys((*SHAPE_FIELDS, *DROPOUT_FIELDS, *(NANOCHAT_FIELDS if is_nanochat else ())))
    return {
        "architecture": "nanochat" if is_nanochat else "gpt2",
        **{name: getattr(config, name) for name in names if hasattr(config, name)},
    }


def describe_own_model(config: Any) -> dict[str, Any]:
    """Of a class of your own all fields that its config declares."""
    declared = [name for name in type(config).__annotations__ if name not in TOKENIZER_FIELDS]
    return {name: getattr(config, name) for name in dict.fromkeys(("vocab_size", "max_position_embeddings", *declared))}


def describe_origin(kind: str, name: str | None, key: str) -> dict[str, str | None]:
    """Where a model or a tokenizer came from; only a name of the Hub is given, no folder of this machine."""
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
        lengths: bytes that each id stands for, or None if that is not known.
    """
    num_bytes = 0 if lengths is None else int(lengths[targets].sum())
    return loss * len(targets) / math.log(2) / num_bytes if num_bytes else None
