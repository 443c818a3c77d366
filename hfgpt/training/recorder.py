"""The records of a run while it trains: metrics.jsonl, samples.md, and progress on the terminal.

Only the main process writes.
"""

import math
import time
from collections.abc import Callable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hfgpt.data.prepare import Rows
from hfgpt.distributed.sharding import count_parameters
from hfgpt.results.records import MetricsLog, SamplesFile, best_evaluation
from hfgpt.system.machine import matmul_peak, training_flops_per_token
from hfgpt.system.progress import ProgressDisplay
from hfgpt.training.checkpoint import TrainState
from hfgpt.training.run import Run
from hfgpt.training.trackers import Trackers

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.md"

DIVERGED = (
    "training diverged. Lower `optim.learning_rate` (with Muon also `optim.muon_learning_rate`) or raise "
    "`optim.warmup_steps`, in another `output_dir`."
)


def check_finite_loss(name: str, loss: float, step: int) -> None:
    """Stop a run whose loss is no number any more; its last checkpoint stays as it is.

    Raises:
        FloatingPointError: saying at which step, and what to do.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(f"`{name}` is {loss} at step {step}: {DIVERGED}")


class Recorder:
    """Writes what happens to the run's folder, and shows it.

    Args:
        folder: the run's folder; its metrics.jsonl and samples.md lose what lies after `start`.
        total_steps: optimizer steps of the whole run.
        prompt: of the samples.
        settings: decoding settings of the samples.
        start: where training starts.
        started_at: `time.perf_counter()` when this process began with the run; now, if it is not given.
        rows_per_step: over all processes.
        final_rows: that are scored after the last step, of both splits.
        peak_tokens_per_second: what the machine would reach if it did nothing but multiply matrices, as fast as it
            can; None leaves the share of it out.
        trackers: get every line too; None on processes that have none.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        prompt: str,
        settings: Mapping[str, Any],
        start: TrainState,
        started_at: float | None = None,
        rows_per_step: int = 1,
        final_rows: int = 0,
        peak_tokens_per_second: float | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        self.total_steps = total_steps
        self.start = start
        self.tokens = start.tokens
        self.peak_tokens_per_second, self.trackers = peak_tokens_per_second, trackers
        self.is_main = PartialState().is_main_process
        self.started_at = time.perf_counter()
        self.process_started_at = self.started_at if started_at is None else started_at
        self.seconds_before = 0.0
        self.evaluations: list[dict[str, Any]] = []
        if not self.is_main:
            return
        self.metrics = MetricsLog(folder / METRICS_FILE)
        self.samples = SamplesFile(folder / SAMPLES_FILE, prompt, settings)
        # A run that starts at step 0 keeps nothing of one that was killed before its first checkpoint. The evaluation
        # of the last step comes after that step's checkpoint, those of other steps before it.
        is_trained = start.step == total_steps
        last_lines = [line for line in self.metrics.read() if line["step"] == total_steps and "val_loss" not in line]
        last_step = start.step - is_trained if start.step else -1
        self.metrics.truncate_after(last_step)
        self.samples.truncate_after(last_step)
        for line in last_lines if is_trained else []:
            self.metrics.write(line)
        lines = self.metrics.read()
        self.evaluations = [line for line in lines if "val_loss" in line]
        self.seconds_before = max((line["elapsed_seconds"] for line in lines), default=0.0)
        self.progress = ProgressDisplay(total_steps, start.step, rows_per_step, final_rows)

    def print_status(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.is_main:
            self.progress.print(text)

    def log_step(self, step: int, loss: float, grad_norm: float, learning_rate: float, tokens: int) -> None:
        """Write a training line.

        Args:
            step: optimizer steps done.
            loss: nats per token, the mean over the targets of this step.
            grad_norm: norm of this step's gradients before clipping; left out where fp16 overflowed.
            learning_rate: of this step.
            tokens: targets trained on so far, over all processes.
        """
        check_finite_loss("loss", loss, step)
        if not self.is_main:
            return
        now = time.perf_counter()
        line = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens": tokens,
            "tokens_per_second": (tokens - self.tokens) / (now - self.started_at),
        }
        self.started_at, self.tokens = now, tokens
        if not math.isfinite(grad_norm):
            del line["grad_norm"]
        details = [f"loss {loss:.3f} nats/token", f"{line['tokens_per_second']:,.0f} tokens/s"]
        if self.peak_tokens_per_second is not None:
            line["peak_share"] = line["tokens_per_second"] / self.peak_tokens_per_second
            details.append(f"{line['peak_share']:.0%} of peak")
        if "grad_norm" in line:
            details.append(f"gradient norm {grad_norm:.2f}")
        self.write(line, "train")
        self.progress.show_step(step, [*details, f"lr {learning_rate:.1e}"])

    def log_skipped_step(self, step: int, tokens: int, grad_norm: float, origin: str) -> None:
        """Log that the last step was left out; `tokens` counts its targets too, `origin` says where it went wrong."""
        if not self.is_main:
            return
        self.write({"step": step, "skipped": origin, "tokens": tokens}, "train")
        self.print_status(f"step {step}/{self.total_steps}  left out: the gradient norm is {grad_norm} ({origin})")

    def count_in_a_row(self, is_wanted: Callable[[dict[str, Any]], bool]) -> int:
        """Consecutive steps, up to where training starts, whose line is wanted; 0 on other than the main process."""
        steps = {line["step"] for line in self.metrics.read() if is_wanted(line)} if self.is_main else set()
        return sum(1 for _ in takewhile(steps.__contains__, range(self.start.step, 0, -1)))

    def log_evaluation(
        self, line: dict[str, Any], sample: str, comparable: dict[str, Any] | None = None, scope: str = ""
    ) -> None:
        """Write an evaluation line and its sample text; the main process calls it.

        Args:
            line: for metrics.jsonl.
            sample: what the model wrote; nothing if it is empty.
            comparable: the same evaluation on the rows of all others, if `line` is of more.
            scope: how many these are, in words.
        """
        self.write(line, "evaluation")
        self.evaluations.append(comparable or line)
        if sample:
            self.samples.append(line["step"], line["tokens"], line["val_loss"], sample)
        best = best_evaluation(self.evaluations)
        gap = line["val_loss"] - line["train_loss"]
        self.print_status(
            f"step {line['step']}/{self.total_steps}  train loss {line['train_loss']:.3f}  "
            f"validation loss {line['val_loss']:.3f} nats/token  perplexity {line['val_perplexity']:.1f}  "
            f"gap {gap:.3f}"
            + (f"  over {scope}" if scope else "")
            + ("" if best in (None, comparable or line) else f"  (best {best['val_loss']:.3f} at step {best['step']})")
        )
        if sample:
            self.print_status("  " + " ".join(sample.split()))

    def write(self, line: dict[str, Any], kind: str) -> None:
        """Append a line to metrics.jsonl, and send it to the trackers, under `kind`."""
        line = {**line, "elapsed_seconds": self.elapsed_seconds()}
        self.metrics.write(line)
        if self.trackers is not None:
            self.trackers.log(line, kind)

    def elapsed_seconds(self) -> float:
        """Of all processes that have worked on the run, each up to the step that the next one went on from."""
        return self.seconds_before + time.perf_counter() - self.process_started_at

    def begin_scoring(self, done: int, total: int) -> None:
        """Show that rows are scored now, of both splits, some of which may be done already."""
        if self.is_main:
            self.progress.begin_scoring(done, total)

    def show_scored(self, done: int) -> None:
        """Show how many of them are done."""
        if self.is_main:
            self.progress.show_scored(done)

    def pause(self) -> None:
        """Stop the clock of training: what follows is no training."""
        self.paused_at = time.perf_counter()

    def resume(self) -> None:
        """Let the clock of training go on."""
        self.started_at += time.perf_counter() - self.paused_at
        if self.is_main:
            self.progress.resume_steps()

    def close(self) -> None:
        """Take the progress bar away, and let the trackers end."""
        if self.is_main:
            self.progress.close()
        if self.trackers is not None:
            self.trackers.finish()


def open_recorder(run: Run, started_at: float) -> Recorder:
    """Open the run's records where training starts: a resumed run drops the lines that it will write again.

    `started_at` is `time.perf_counter()` when this process began with the run.
    """
    config, process = run.config, PartialState()
    peak = None
    if process.device.type != "cpu":  # what a CPU reaches depends on what else the machine does, a GPU is the run's own
        peak = process.num_processes * matmul_peak(process.device, config.train.precision)
        peak /= training_flops_per_token(run.model, config.data.block_size)
    recorder = Recorder(
        folder=run.folder,
        total_steps=run.total_steps,
        prompt=config.sample.prompt,
        settings={name: getattr(config.sample, name) for name in ("max_new_tokens", "temperature", "top_k")},
        start=run.start,
        started_at=started_at,
        rows_per_step=run.identity["number of rows per step"],
        final_rows=sum(min(run.final_rows, len(rows)) for rows in (run.rows.train, run.rows.validation)),
        peak_tokens_per_second=peak,
        trackers=Trackers(config, run.folder, run.start.step) if process.is_main_process else None,
    )
    recorder.print_status(
        f"{count_parameters(run.model):,} parameters, {len(run.tokenizer):,} token ids; {describe(run.rows)}"
    )
    if run.resume_from is not None:
        recorder.print_status(f"going on from {run.resume_from} at step {run.start.step}")
    return recorder


def describe(rows: Rows) -> str:
    """How much text there is."""
    train, validation = (
        f"{count.tokens:,} tokens in {count.rows:,} rows, {count.remainder} left over"
        for count in (rows.train_counts, rows.validation_counts)
    )
    return f"train {'from a stream' if rows.streamed is not None else train}; validation {validation}"
