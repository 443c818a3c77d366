"""`hfgpt evaluate`: a model measured on texts and on tasks, as one table."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather

from hfgpt.config.schema import DataConfig
from hfgpt.data.text import is_plain_text, read_source
from hfgpt.data.vocabulary import MOST_UNKNOWN, describe_unknown
from hfgpt.distributed.launch import join_processes
from hfgpt.evaluation.lm_eval_tasks import find_tasks, run_tasks
from hfgpt.evaluation.load_model import check_causal, choose_context, choose_device, load_causal_lm
from hfgpt.evaluation.perplexity import EncodedTexts, Measurement, encode_texts, measure_texts
from hfgpt.results.notebook import html_text
from hfgpt.results.records import RESULTS_FILE
from hfgpt.system.console import align_columns, print_status
from hfgpt.system.machine import peak_memory_bytes
from hfgpt.system.storage import write_json


@dataclass(frozen=True)
class TextReport:
    """A model on texts.

    Attributes:
        documents: texts; empty ones are left out.
        tokens: targets, each scored once.
        special_tokens: how many of them are special tokens.
        unknown_share: tokens that stand for what the tokenizer does not know, among all, in [0, 1]; see `Coverage`.
        loss_of_text: why the tokens do not determine the texts, so that there are no figures per word and byte; None if
            they do.
        words: of all texts, as lm-eval counts them.
        bytes: of all texts, in UTF-8.
        convention: what is conditioned on what.
        context: longest window, in tokens.
        dtype: of the model's weights; losses are fp32 and their sums fp64 in any case.
        device: of the model.
        processes: that shared the work.
        measurements: by stride; the first one is the context.
        peak_memory_bytes: see `hfgpt.system.machine.peak_memory_bytes`; of the process that needed most.
    """

    documents: int
    tokens: int
    special_tokens: int
    unknown_share: float
    loss_of_text: str | None
    words: int
    bytes: int
    convention: str
    context: int
    dtype: str
    device: str
    processes: int
    measurements: list[Measurement]
    peak_memory_bytes: int


@dataclass(frozen=True)
class Report:
    """What `hfgpt evaluate` found.

    Attributes:
        model: as it was named.
        text: on texts, if any were given.
        tasks: figures by task; see `hfgpt.evaluation.lm_eval_tasks.run_tasks`.
    """

    model: str
    text: TextReport | None
    tasks: dict[str, dict[str, Any]]

    def __repr__(self) -> str:
        return render(self)

    def _repr_html_(self) -> str:
        return html_text(render(self))


def measure(
    source: str,
    files: str | Sequence[str] = (),
    *,
    text_column: str = "text",
    tokenizer_name: str | None = None,
    strides: Sequence[int] | None = None,
    context: int | None = None,
    first_token: str = "lm-eval",
    batch_size: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """Measure a model. On several processes each calls it, and each has the result.

    Args:
        source: folder or Hub id of any causal language model, or a file of a format that hfgpt reads.
        files: a text, or some, see `hfgpt.config.schema.DataConfig`.
        text_column: see there.
        tokenizer_name: folder or Hub id; None is that of the model.
        strides: of passes beside the one whose stride is the context; None takes half the context.
        context: longest window, in tokens; None takes the model's.
        first_token: see `hfgpt.evaluation.perplexity.FIRST_TOKEN`.
        batch_size: windows in one forward pass; see `hfgpt.evaluation.perplexity.measure_texts`; of tasks, 8 if None.
        dtype: see `hfgpt.evaluation.load_model.load_causal_lm`.
        device: such as "cpu" or "cuda:1"; None leaves it to accelerate.
        tasks: see `hfgpt.evaluation.lm_eval_tasks.find_tasks`.
        limit: documents of each task; None takes all.
        trust_remote_code: see `hfgpt.evaluation.load_model.load_causal_lm`.

    Raises:
        ValueError: nothing to measure, or something that does not fit.
        ConnectionError: a task's data cannot be fetched.
        FloatingPointError: the model's loss is no number.
    """
    files = [files] if isinstance(files, str) else files
    if not files and not tasks:
        raise ValueError("give `--data`, `--tasks` or both: there is nothing to measure the model on.")
    if limit is not None and not tasks:
        raise ValueError(f"`--limit` ({limit}) has no effect without `--tasks`.")
    join_processes()
    if tasks and PartialState().num_processes > 1:
        raise ValueError(
            "`--tasks` runs in one process. Start it without `accelerate launch`, or only `--data` with it."
        )
    found = find_tasks(tasks) if tasks else None
    model, tokenizer = load_causal_lm(source, tokenizer_name, dtype, trust_remote_code)
    length = choose_context(model, context)
    model.to(choose_device(device))
    check_causal(model)
    text = None
    if files:
        rows = model.get_input_embeddings().weight.shape[0]
        encoded = encode_texts(tokenizer, read_texts(list(files), text_column), first_token, rows)
        if encoded.coverage.unknown_share > MOST_UNKNOWN:
            print_status(f"warning: {describe_unknown(encoded.coverage.unknown_share)}")
        others = [max(1, length // 2)] if strides is None else strides
        passes = list(dict.fromkeys([length, *others]))
        measurements = [measure_texts(model, encoded, length, stride, batch_size) for stride in passes]
        text = report_text(encoded, length, model, measurements)
    figures = {} if found is None else run_tasks(model, tokenizer, found, length, batch_size or 8, limit)
    return Report(source, text, figures)


def read_texts(files: list[str], text_column: str) -> list[str]:
    """Read files as documents; the main process first, so that the others find them stored.

    Raises:
        ValueError: no such file, no text in it, or a column that has no effect.
    """
    data = DataConfig(files=files, text_column=text_column)
    if text_column != DataConfig.text_column and is_plain_text(data):
        raise ValueError(f"`--text-column` ({text_column!r}) has no effect: plain text has no columns.")
    with PartialState().main_process_first():
        return list(read_source(data, files, None)["text"][:])


def report_text(texts: EncodedTexts, context: int, model: Any, measurements: list[Measurement]) -> TextReport:
    """Put together what was measured on texts."""
    process = PartialState()
    peak = torch.tensor([peak_memory_bytes()], device=process.device if process.num_processes > 1 else "cpu")
    return TextReport(
        documents=len(texts.ids),
        tokens=measurements[0].tokens,
        special_tokens=texts.special_tokens,
        unknown_share=texts.coverage.unknown_share,
        loss_of_text=texts.coverage.loss_of_text,
        words=texts.words,
        bytes=texts.bytes,
        convention=texts.convention,
        context=context,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        processes=process.num_processes,
        measurements=measurements,
        peak_memory_bytes=int(gather(peak).max()),
    )


def save_tasks(source: str, figures: dict[str, dict[str, Any]]) -> str | None:
    """Write the figures of tasks, if there are any, into a finished run's results.json, beside all that is there.

    Returns:
        The file's path, or None where the model is no finished run's.

    Raises:
        ValueError: the file is no JSON object. It is left as it is.
    """
    path = Path(source) / RESULTS_FILE
    if not figures or not path.is_file():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); the tasks' results cannot be added to it.") from error
    if not isinstance(results, dict) or not isinstance(results.get("lm_eval", {}), dict):
        raise ValueError(f"{path} is not as a run leaves it; the tasks' results cannot be added to it.")
    write_json(path, {**results, "lm_eval": {**results.get("lm_eval", {}), **figures}})
    return str(path)


def to_json(report: Report) -> dict[str, Any]:
    """The report as JSON holds it: what is infinite is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(item) for name, item in value.items()}
        if isinstance(value, list):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    result: dict[str, Any] = finite(asdict(report))
    return result


def render(report: Report) -> str:
    """The report as a person reads it."""
    text = [] if report.text is None else [render_text(report.model, report.text)]
    return "\n\n".join([*text, *([render_tasks(report.tasks)] if report.tasks else [])])


def render_text(model: str, text: TextReport) -> str:
    documents = "1 document" if text.documents == 1 else f"{text.documents:,} documents"
    special = f", {text.special_tokens:,} of them special," if text.special_tokens else ","
    where = text.device if text.processes == 1 else f"{text.processes} processes"
    head = [
        f"{model}: {documents}, {text.bytes:,} bytes, {text.words:,} words",
        f"{text.tokens:,} tokens{special} each scored once",
        text.convention,
        f"context {text.context} tokens, {text.dtype} on {where}",
    ]
    if text.unknown_share:
        head.append(describe_unknown(text.unknown_share))
    if text.loss_of_text is not None:
        head.append(f"nothing per word or byte, because other texts have the same tokens: {text.loss_of_text}")

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    rows: list[tuple[str, list[str]]] = [
        ("", ["windows" if each.stride == text.context else f"stride {each.stride}" for each in text.measurements]),
        ("loss, nats/token", [number(each.loss, 4) for each in text.measurements]),
        ("  standard error", [number(each.loss_standard_error, 4) for each in text.measurements]),
        ("token perplexity", [number(each.token_perplexity, 3) for each in text.measurements]),
        ("word perplexity", [number(each.word_perplexity, 3) for each in text.measurements]),
        ("byte perplexity", [number(each.byte_perplexity, 4) for each in text.measurements]),
        ("bits per byte", [number(each.bits_per_byte, 4) for each in text.measurements]),
        ("forward passes", [f"{each.windows:,} rows" for each in text.measurements]),
        ("time", [f"{each.elapsed_seconds:,.1f} s" for each in text.measurements]),
    ]
    table = align_columns([[name, *cells] for name, cells in rows], numbers=True)
    return "\n".join([*head, "", table, f"peak memory {text.peak_memory_bytes / 1e6:,.0f} MB"])


def render_tasks(tasks: dict[str, dict[str, Any]]) -> str:
    rows = [["task", "metric", "value", "standard error", "documents"]]
    for task, found in tasks.items():
        for name, value in found.items():
            error = found.get(f"{name}_stderr")
            if isinstance(value, float | str) and not name.endswith(("_stderr", "_version")):
                shown = [f"{each:,.4f}" if isinstance(each, float) else str(each or "-") for each in (value, error)]
                rows.append([task, name, *shown, str(found["samples"])])
    return "\n\n".join([f"lm-eval {next(iter(tasks.values()))['lm_eval_version']}", align_columns(rows)])
