"""When to stop early, and which weights are the best so far.

Everything follows from the evaluation lines of metrics.jsonl, so a run that was stopped decides as one that was not.
"""

from collections.abc import Sequence
from typing import Any

from accelerate.utils import broadcast_object_list

from hfgpt.results.records import best_evaluation
from hfgpt.training.recorder import Recorder


def is_patience_spent(evaluations: Sequence[dict[str, Any]], patience: int) -> bool:
    """Whether the last `patience` evaluations have all failed to lower the validation loss.

    Source:
        Prechelt 1998, "Early Stopping - But When?", criterion UP, https://doi.org/10.1007/3-540-49430-8_3
    """
    best = best_evaluation(evaluations)
    return best is not None and sum(line["step"] > best["step"] for line in evaluations) >= patience


class EarlyStopping:
    """`train.patience`: training ends when so many evaluations in a row were no better than the best.

    Args:
        patience: evaluations to wait; None never stops early, and marks none as the best.
        recorder: knows the evaluations, on the main process.
    """

    def __init__(self, patience: int | None, recorder: Recorder) -> None:
        self.patience, self.recorder = patience, recorder

    def update(self) -> tuple[bool, bool]:
        """Look at the evaluations so far; every process calls it and gets the same.

        Returns:
            Whether the newest evaluation is the best so far, so that a checkpoint must keep its weights; and whether
            training should stop.
        """
        if self.patience is None:
            return False, False
        lines = self.recorder.evaluations
        answer = (bool(lines) and best_evaluation(lines) == lines[-1], is_patience_spent(lines, self.patience))
        return broadcast_object_list([answer])[0]
