"""Which evaluation was the best, and when there is no use in going on.

Everything follows from the evaluation lines of metrics.jsonl, so a run that was stopped decides as one that was not.
"""

from collections.abc import Sequence
from typing import Any

from hfgpt.results.records import best_evaluation


def is_patience_spent(evaluations: Sequence[dict[str, Any]], patience: int) -> bool:
    """Whether the last `patience` evaluations have all failed to lower the validation loss.

    Source:
        Prechelt 1998, "Early Stopping - But When?", criterion UP, https://doi.org/10.1007/3-540-49430-8_3
    """
    best = best_evaluation(evaluations)
    return best is not None and sum(line["step"] > best["step"] for line in evaluations) >= patience
