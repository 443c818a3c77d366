"""What a run writes as it goes, metrics.jsonl and samples.md; and its results.json, read.

Only the main process writes. Files grow by a whole line or section at a time, so a killed run leaves at most one torn
end, which `truncate_after` removes when the run is resumed.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfgpt.system.quoting import quote
from hfgpt.system.storage import encode_json, write_atomically

RESULTS_FILE, PLOT_FILE = "results.json", "loss.png"
# One sample in samples.md, as `SamplesFile.append` writes it. Its text holds no run of backticks as long as its fence.
SAMPLE_SECTION = re.compile(r"\n## step (\d+) \([^\n]*\)\n\n(`{3,})text\n(.*?)\n\2\n", re.DOTALL)


class MetricsLog:
    """metrics.jsonl: one JSON object a line, appended as the run goes; created empty if there is none.

    A run that is resumed calls `truncate_after(step of the checkpoint)` before it writes, one that starts anew
    `truncate_after(-1)`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.touch()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line and hand it to the operating system.

        Args:
            record: has `step`; every number is finite.

        Raises:
            ValueError: a number is NaN or infinite. JSON cannot say so, and null would not be true.
        """
        line = encode_json(record, f"at step {record['step']}") + b"\n"
        with self.path.open("ab") as file:
            file.write(line)

    def read(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps than `step`, and a last line that a kill tore."""
        lines = complete_lines(self.path)
        kept = [line + b"\n" for line, record in zip(lines, self.read(), strict=True) if record["step"] <= step]
        write_atomically(self.path, b"".join(kept))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in the order written, without a last line that is torn or still being written.

    Raises:
        ValueError: another line is not JSON.
    """
    records = []
    for number, line in enumerate(complete_lines(path), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}. Delete it to read the rest.") from error
    return records


def complete_lines(path: str | Path) -> list[bytes]:
    """Lines that end in a newline, without it."""
    return Path(path).read_bytes().split(b"\n")[:-1]


def training_speed(metrics: list[dict[str, Any]]) -> float | None:
    """Tokens per second over all training lines of metrics.jsonl, evaluations and checkpoints left out."""
    training = [record for record in metrics if "tokens_per_second" in record]
    tokens = [0, *(record["tokens"] for record in training)]
    seconds = sum(
        (after - before) / record["tokens_per_second"]
        for before, after, record in zip(tokens[:-1], tokens[1:], training, strict=True)
    )
    return tokens[-1] / seconds if training else None


class SamplesFile:
    """samples.md: what the model wrote at each evaluation, below the prompt and the settings of decoding.

    Created with its header if there is none. When a run goes on or starts anew, call `truncate_after` as for
    `MetricsLog`.

    Args:
        path: the file.
        prompt: text that every sample continues.
        settings: how samples are drawn, by name: `max_new_tokens`, `temperature`, `top_k` ...

    Raises:
        ValueError: the file is there and has another prompt or other settings.
    """

    def __init__(self, path: str | Path, prompt: str, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        decoding = ", ".join(f"{name} {value}" for name, value in settings.items())
        self.header = f"# Samples\n\nPrompt:\n\n{fenced(prompt)}\nDecoding: {decoding}.\n"
        if not self.path.exists():
            write_atomically(self.path, self.header.encode())
        elif not self.path.read_bytes().startswith(self.header.encode()):
            raise ValueError(
                f"{self.path} holds samples of another prompt or other settings than {quote(decoding)}. Move it away, "
                "or use another `output_dir`."
            )

    def append(self, step: int, tokens: int, val_loss: float, text: str) -> None:
        """Add the sample of one evaluation.

        Args:
            step: optimizer step of the evaluation.
            tokens: tokens seen until then.
            val_loss: nats per token.
            text: what was written, in full.
        """
        section = f"\n## step {step} (tokens {tokens:,}, validation loss {val_loss:.4f})\n\n{fenced(text)}"
        with self.path.open("ab") as file:
            file.write(section.encode())

    def read(self) -> list[tuple[int, str]]:
        """Step and text of every sample, in the order written."""
        return [(int(section[1]), section[3]) for section in self.sections()]

    def truncate_after(self, step: int) -> None:
        """Drop the samples of later steps than `step`, and a last one that a kill tore."""
        kept = [section[0] for section in self.sections() if int(section[1]) <= step]
        write_atomically(self.path, "".join([self.header, *kept]).encode())

    def sections(self) -> Iterator[re.Match[str]]:
        """Every complete sample, one after the other: what looks like a heading inside a sample is never found."""
        content = self.path.read_bytes().decode(errors="replace")  # only a torn end can be no UTF-8, and it is left out
        position = len(self.header)
        while section := SAMPLE_SECTION.match(content, position):
            position = section.end()
            yield section


def fenced(text: str) -> str:
    """`text` as a Markdown code block, whose fence is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}\n"


def read_results(path: Path) -> dict[str, Any]:
    """What a results.json holds.

    Raises:
        ValueError: it is no JSON object.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(results, dict):
        raise ValueError(f"{path} is not what a run leaves: it must be a JSON object.")
    return results


def comparable_lines(metrics: list[dict[str, Any]], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, with the last evaluation on the rows of all others, where it scored more.

    Args:
        metrics: of a finished run.
        results: of the same run, what results.json holds.
    """
    index = max((i for i, line in enumerate(metrics) if "val_loss" in line), default=None)
    if index is None or metrics[index]["val_loss"] != results.get("val_loss") or "eval_rows_val_loss" not in results:
        return metrics
    losses = {name: results[f"eval_rows_{name}"] for name in ("train_loss", "val_loss")}
    return [*metrics[:index], {**metrics[index], **losses}, *metrics[index + 1 :]]


def best_evaluation(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The evaluation with the lowest validation loss, the earlier of equals; None if there is none.

    That of step 0 does not count: it is of no trained model.

    Args:
        evaluations: lines with `step` and `val_loss`, in nats per token, all over the same validation rows.
    """
    trained = [line for line in evaluations if line["step"] > 0]
    return min(trained, key=lambda line: (line["val_loss"], line["step"]), default=None)
