"""A recipe from its text to its results, through the loop that it names."""

import time
from typing import Any

from hfgpt.config.schema import RunConfig
from hfgpt.distributed.launch import hint_to_scale_out
from hfgpt.training.evaluate import catch_up, make_recorder
from hfgpt.training.finish import finish_run
from hfgpt.training.run import open_run
from hfgpt.training.signals import StopRequest
from hfgpt.training.startup_checks import check_start


def train(config: RunConfig, resume: bool | str = False) -> dict[str, Any] | None:
    """Prepare, train and finish a run.

    Args:
        config: from `hfgpt.config.loading.load_config`.
        resume: see `open_run`.

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
        from hfgpt.training.trainer import (
            run_trainer as train_loop,  # takes seconds to import, so only when it is wanted
        )
    else:
        from hfgpt.training.loop import run_loop as train_loop
    recorder = make_recorder(run, started_at)
    if (hint := hint_to_scale_out()) is not None:
        recorder.say(hint)
    try:
        with StopRequest() as stop:
            catch_up(run, recorder, stop)
            if run.position.step == 0:
                check_start(run, recorder)
            position = train_loop(run, recorder, stop)
            return finish_run(run, recorder, position, stop)
    finally:
        recorder.close()
        if run.lock is not None:
            run.lock.release()
