"""A recipe from its text to its results, through the loop that it names."""

import time
from collections.abc import Callable
from typing import Any

from hfgpt.config.schema import RunConfig
from hfgpt.distributed.launch import hint_to_scale_out
from hfgpt.system.console import route_lines
from hfgpt.training.control import TrainingControl
from hfgpt.training.finish import finish_run
from hfgpt.training.recorder import open_recorder
from hfgpt.training.run import open_run
from hfgpt.training.signals import StopRequest
from hfgpt.training.startup_checks import check_start


def train(
    config: RunConfig, resume: bool | str = False, on_step: Callable[[int], None] = lambda step: None
) -> dict[str, Any] | None:
    """Prepare, train and finish a run.

    Args:
        config: from `hfgpt.config.load_config`.
        resume: see `open_run`.
        on_step: called with the number of each step that is done, see `TrainingControl`.

    Returns:
        What results.json holds, on the main process; an empty dict on others; None if the run was finished before.

    Raises:
        ValueError: the run cannot be made ready, see `open_run`.
        FloatingPointError: training diverged.
        Stopped: it was asked to stop by a signal, and can go on.
    """
    started_at = time.perf_counter()
    run = open_run(config, resume)
    if run is None:
        return None
    if config.loop == "trainer":
        from hfgpt.training.trainer import run_trainer as train_loop  # takes seconds to import, so only if wanted
    else:
        from hfgpt.training.loop import run_loop as train_loop
    recorder = open_recorder(run, started_at)
    if (hint := hint_to_scale_out()) is not None:
        recorder.print_status(hint)
    try:
        with route_lines(recorder.print_status), StopRequest() as stop:
            control = TrainingControl(run, recorder, stop, on_step)
            control.evaluate_start()
            if run.start.step == 0:
                check_start(run, recorder)
            train_loop(run, control)
            return finish_run(control)
    finally:
        recorder.close()
        if run.lock is not None:
            run.lock.release()
