"""A recipe from its text to its results, through the loop that it names."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hfgpt.config.loading import load_config
from hfgpt.config.schema import RunConfig
from hfgpt.distributed.launch import hint_to_scale_out
from hfgpt.results.notebook import RunResults
from hfgpt.system.console import route_lines
from hfgpt.training.control import TrainingControl
from hfgpt.training.finish import finish_run
from hfgpt.training.recorder import open_recorder
from hfgpt.training.run import open_run
from hfgpt.training.signals import StopRequest
from hfgpt.training.startup_checks import check_start, choose_compile


def train(
    recipe: RunConfig | str | Path,
    overrides: Mapping[str, Any] | Iterable[str] = (),
    *,
    resume: bool | str = False,
    on_step: Callable[[int], None] = lambda step: None,
) -> RunResults:
    """Prepare, train and finish a run: `hfgpt.train("demo", {"train.max_steps": 100, "output_dir": "out/mine"})`.

    Args:
        recipe: a YAML file, or the name of a recipe that comes with hfgpt; or a config from `load_config`.
        overrides: values that differ from the recipe's, see `hfgpt.config.loading.load_config`.
        resume: see `open_run`.
        on_step: called with the number of each step that is done, see `TrainingControl`.

    Returns:
        What results.json holds, on the main process; none of it on others. If the run was finished before,
        `was_finished` is true.

    Raises:
        ValueError: the recipe is wrong, or the run cannot be made ready, see `open_run`.
        FloatingPointError: training diverged.
        Stopped: it was asked to stop by a signal, and can go on.
    """
    started_at = time.perf_counter()
    if not isinstance(recipe, RunConfig):
        config = load_config(recipe, overrides)
    elif overrides:
        raise ValueError(f"`overrides` ({overrides!r}) go with a recipe; a config has its values already.")
    else:
        config = recipe
    run = open_run(config, resume)
    if run is None:
        return RunResults.read(config.output_dir)
    if run.is_compiled is None:
        run = replace(run, is_compiled=choose_compile(run))
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
            return RunResults(finish_run(control), config.output_dir)
    finally:
        recorder.close()
        if run.lock is not None:
            run.lock.release()
