"""The lines of metrics.jsonl, sent to trackers as well, through accelerate's own classes for them.

They get numbers and options, nothing else: no environment variable, no path above the last name, no address with its
password. Both loops speak to them through the recorder.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from hfgpt.config.loading import flatten
from hfgpt.config.schema import RunConfig
from hfgpt.system.extras import needs

PROJECT = "hfgpt"
"""Under which trackers that have projects file a run; its name is that of its folder."""

TRACKERS_FOLDER = "trackers"
"""Inside the run's folder, where trackers that write files do so. They put the machine's name into them."""

PATHS = ("output_dir", "init_from", "tokenizer.name", "data.files", "data.validation_files")

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

RUN_IDS: dict[str, Callable[[Any], str]] = {
    "wandb": lambda tracker: tracker.tracker.id,
    "mlflow": lambda tracker: tracker.tracker.info.run_id,
}
"""How to find the name that a tracker has given to a run; it is kept, for going on with that run."""


def check_trackers(names: Iterable[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        ValueError: saying what to install.
    """
    for name in names:
        if find_spec(name) is None:
            raise ValueError(needs(f"`train.trackers=[{name}]`", name))


class Trackers:
    """The trackers of a run, as one; on the main process, others have none.

    Args:
        config: of the run; names the trackers.
        folder: of the run.
        step: optimizer steps done where training starts. Above 0 the trackers go on with the run that is there.
            TensorBoard then hides what lies after that step; the others keep it, and see those steps once more.
    """

    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        self.started: list[GeneralTracker] = []
        for name in dict.fromkeys(config.train.trackers):
            id_file = folder / TRACKERS_FOLDER / f"{name}.id"
            run_id = id_file.read_text(encoding="utf-8") if step and id_file.is_file() else None
            tracker = LOGGER_TYPE_TO_CLASS[name](**settings(name, folder, step, run_id))
            with redirect_stdout(sys.stderr):  # stdout is for results
                tracker.start()
                if not step:
                    tracker.store_init_configuration(public_options(config))
            if name in RUN_IDS:
                id_file.parent.mkdir(exist_ok=True)
                id_file.write_text(RUN_IDS[name](tracker), encoding="utf-8")
            self.started.append(tracker)

    def log(self, line: Mapping[str, Any], kind: str) -> None:
        """Send the numbers of a line of metrics.jsonl, as `kind/name`."""
        numbers = {
            f"{kind}/{name}": value for name, value in line.items() if isinstance(value, int | float) and name != "step"
        }
        for tracker in self.started:
            with redirect_stdout(sys.stderr):
                tracker.log(numbers, step=line["step"])

    def finish(self) -> None:
        """Bring everything to where it belongs."""
        for tracker in self.started:
            with redirect_stdout(sys.stderr):
                if tracker.name == "trackio":  # 0.43 would end the run again when the program ends
                    import trackio

                    trackio.finish()
                else:
                    tracker.finish()
        self.started.clear()


def settings(name: str, folder: Path, step: int, run_id: str | None) -> dict[str, Any]:
    """What accelerate's class for a tracker is made with, and hands on to the tracker."""
    if name == "tensorboard":
        logging_dir = folder / TRACKERS_FOLDER
        return {"run_name": "tensorboard", "logging_dir": logging_dir, "purge_step": step + 1 if step else 0}
    if name == "trackio":
        private = {"auto_log_cpu": False, "auto_log_gpu": False}
        return {"run_name": PROJECT, "name": folder.name, "resume": "allow" if step else "never", **private}
    if name == "wandb":
        # Without these it takes command line, program, packages, git's remote and the terminal along.
        hidden = {"x_disable_meta": True, "x_save_requirements": False, "disable_git": True, "disable_code": True}
        wandb_settings = {**hidden, "console": "off"}
        resume = "allow" if run_id else None
        return {"run_name": PROJECT, "name": folder.name, "id": run_id, "resume": resume, "settings": wandb_settings}
    # Of its own accord MLflow would name the user and the path of the program.
    tags = {"mlflow.user": PROJECT, "mlflow.source.name": PROJECT}
    return {"experiment_name": PROJECT, "run_name": folder.name, "run_id": run_id, "tags": tags}


def public_options(config: RunConfig) -> dict[str, int | float | str | bool]:
    """Every option of a run as `section.name`, without what names a folder, a user or a password."""
    options = {
        name: ", ".join(last_name(str(item)) for item in value) if isinstance(value, list) else value
        for name, value in flatten(asdict(config)).items()
        if value is not None and value != {}
    }
    for name in PATHS:
        if name in options:
            options[name] = last_name(str(options[name]))
    source = options.get("data.source")
    if source is not None and not HUB_ID.fullmatch(str(source)):
        options["data.source"] = last_name(str(source))
    return options


def last_name(path: str) -> str:
    """A path or address without what stands before its last `/`, and what stands behind a `?`."""
    return Path(path.partition("?")[0]).name
