"""Which evaluation was the best, and when there is no use in going on.

Everything follows from the evaluation lines of metrics.jsonl, so a run that was stopped decides as one that was not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import broadcast_object_list

from hfgpt.results.records import best_evaluation
from hfgpt.training.recorder import Recorder
from hfgpt.training.run import Run


def is_patience_spent(evaluations: Sequence[dict[str, Any]], patience: int) -> bool:
    """Whether the last `patience` evaluations have all failed to lower the validation loss.

    Source:
        Prechelt 1998, "Early Stopping - But When?", criterion UP, https://doi.org/10.1007/3-540-49430-8_3
    """
    best = best_evaluation(evaluations)
    return best is not None and sum(line["step"] > best["step"] for line in evaluations) >= patience


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
