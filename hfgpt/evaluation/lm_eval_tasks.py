"""Tasks of lm-evaluation-harness (HellaSwag, LAMBADA, your own YAML), run in this process on a model in memory."""

import copy
import difflib
import io
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hfgpt.config.recipes import find_bundled
from hfgpt.data.tokenizer import encode_arrays
from hfgpt.data.vocabulary import cover, describe_unknown
from hfgpt.system.console import print_status
from hfgpt.system.extras import needs

TaskDict = dict[str, dict[str, Any]]
"""Tasks, groups of tasks and what is in them, by name, as the harness passes them on."""

BOOTSTRAPS = 1000
"""Draws for the standard error of what is no mean, such as LAMBADA's perplexity; itself known to 2 percent then."""

PER_TEXT = ("word_perplexity", "byte_perplexity", "bits_per_byte")
"""Metrics that divide by what is in a text, not by its tokens."""

FEWSHOT_SEED = 1234
"""The harness's own default, for tasks that come with examples."""


def find_tasks(wanted: Sequence[str]) -> TaskDict:
    """Find tasks and fetch their data.

    Args:
        wanted: YAML files of tasks, folders of such files, names of tasks that come with hfgpt, or names of the
            harness's tasks or groups.

    Returns:
        What `lm_eval.evaluate` takes.

    Raises:
        ValueError: lm-eval is not installed, there is no such task, or a file does not define one.
        ConnectionError: a task's data is not here and cannot be fetched.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(needs("`--tasks`", "lm-eval")) from error
    folders = [spec for spec in wanted if Path(spec).is_dir()]
    files = [spec for spec in wanted if Path(spec).is_file()]
    bundled = {spec: find_bundled(spec, "lm-eval") for spec in wanted if spec not in (*folders, *files)}
    files += [str(path) for path in bundled.values() if path is not None]
    names = [spec for spec, path in bundled.items() if path is None]
    with quiet():
        manager = TaskManager(include_path=folders or None, include_defaults=bool(names))
        specs = [*names, *files]
        for folder in folders:
            found = TaskManager(include_path=folder, include_defaults=False).all_subtasks
            if not found:
                raise ValueError(f"the folder {folder} holds no YAML file that defines a task.")
            specs += found
        for name in names:
            if name not in manager.all_tasks:
                nearest = difflib.get_close_matches(name, manager.all_tasks, n=1)
                hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
                raise ValueError(f"`--tasks`: {name!r} is no task of lm-eval {version('lm-eval')}, and no path.{hint}")
        loaded: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
        for spec in specs:
            try:
                for kind, found_here in manager.load([spec]).items():
                    loaded[kind].update(found_here)
            except (OSError, DatasetsError) as error:
                reason = " ".join(str(error).split())
                raise ConnectionError(f"the data of the task {spec!r} cannot be fetched: {reason}") from error
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"`--tasks`: {spec!r} is no task: {' '.join(str(error).split())}") from error
    return loaded


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tasks: TaskDict,
    context: int,
    batch_size: int = 8,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks, and keep their figures.

    Args:
        model: any causal language model, in eval mode.
        tokenizer: of the model.
        tasks: from `find_tasks`.
        context: longest input, in tokens.
        batch_size: inputs in one forward pass.
        limit: documents of each task; None takes all.

    Returns:
        By task, or group of tasks: each metric as the harness names it (`acc_norm`, with the name of a filter if there
        is one), `..._stderr`, `samples`, `num_fewshot`, `task_version`, `lm_eval_version` and `context`. What is not
        finite is a text, as JSON cannot hold it. What is divided by words or bytes is left out where the tokens of a
        task do not determine its texts.

    Raises:
        ValueError: the tokenizer has no token to begin with, or does not know all of a text.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError("`--tasks` needs a bos or an eos token, which lm-eval puts first; the tokenizer has none.")
    without = {name for name, task in tasks["tasks"].items() if is_lossy(name, task, tokenizer)}
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    with quiet() as cut:
        harness = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it is given a pad token
            backend="causal",
            batch_size=batch_size,
            max_length=context,
        )
        found: Any = evaluate(harness, tasks, limit=limit, log_samples=False, bootstrap_iters=BOOTSTRAPS)
    if cut.inputs:
        print_status(
            f"{cut.inputs:,} inputs of the tasks are longer than {context} tokens: lm-eval left out their beginnings."
        )
    return {
        name: figures(name, metrics, found, name not in without) | {"context": context}
        for name, metrics in found["results"].items()
    }


def is_lossy(name: str, task: Any, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a task scores whole texts that their tokens do not determine; then says so."""
    if task.get_config("output_type") != "loglikelihood_rolling":
        return False
    texts = [task.doc_to_target(doc) for doc in task.eval_docs]
    coverage = cover(tokenizer, texts, encode_arrays(tokenizer, texts, split_special_tokens=False))
    if coverage.loss_of_text is not None:
        unknown = f"{describe_unknown(coverage.unknown_share)}, " if coverage.unknown else ""
        print_status(f"{name}: {unknown}nothing per word or byte, because other texts have the same tokens")
    return coverage.loss_of_text is not None


def figures(task: str, metrics: dict[str, Any], found: dict[str, Any], is_whole: bool) -> dict[str, Any]:
    """One task's line of the results; without what is divided by words or bytes if their texts are not `is_whole`."""
    result: dict[str, Any] = {}
    for key, value in metrics.items():
        name, _, filter_name = key.partition(",")
        if not is_whole and name.removesuffix("_stderr") in PER_TEXT:
            continue
        if isinstance(value, int | float) and name != "sample_len":  # `samples` says it, of groups too
            full_name = name if filter_name in ("none", "") else key
            result[full_name] = value if math.isfinite(value) else str(value)
    result["samples"] = found["n-samples"].get(task, {}).get("effective")
    result["num_fewshot"] = found["n-shot"].get(task)
    result["task_version"] = found["versions"].get(task)
    result["lm_eval_version"] = version("lm-eval")
    return result


class CutInputs(logging.Handler):
    """Takes the harness's warnings, and counts those of inputs that it cut to the context."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.inputs = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.inputs += record.getMessage().startswith("Combined length of context")


@contextmanager
def quiet() -> Iterator[CutInputs]:
    """Keep the harness's talk off stdout, and its bars from where nobody watches."""
    cut, logger = CutInputs(), logging.getLogger("lm_eval")
    logger.addHandler(cut)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    # Without processes of its own for the standard errors: they would be forked from a process with threads.
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    terminal = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with redirect_stdout(terminal), redirect_stderr(terminal):
            yield cut
    finally:
        logger.removeHandler(cut)
        os.environ.pop("DISABLE_MULTIPROC")
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before
