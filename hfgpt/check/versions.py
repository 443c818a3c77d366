"""Under which versions of transformers a model folder was tried: what is written down, and nothing else."""

import json
from pathlib import Path

import transformers
from packaging.requirements import Requirement

from hfgpt import NEWEST_TRIED, __version__
from hfgpt.system.extras import requirements

HFGPT = "hfgpt"


def describe_versions(folder: Path) -> str:
    """One line: the version that saved a folder, the one that tries it now, and those of hfgpt's own tests.

    The first is in config.json. The last go for hfgpt's own architecture only: the oldest that hfgpt asks for, and
    `NEWEST_TRIED`; its tests were run with both.

    Args:
        folder: of a model; it has a config.json.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    saved_by = config.get("transformers_version")
    said = f"saved by transformers {saved_by}" if saved_by else "config.json does not say which transformers saved it"
    said = f"{said}; tried here with {transformers.__version__}"
    if config.get("model_type") == HFGPT:
        newest = ".".join(map(str, NEWEST_TRIED))
        said += f"; hfgpt {__version__}'s own tests were run with {oldest_allowed()} and {newest}"
    return f"{folder}: {said}."


def oldest_allowed() -> str:
    """The oldest transformers that hfgpt asks for."""
    needed: Requirement = next(each for each in requirements() if each.name == "transformers")
    return next(each.version for each in needed.specifier if each.operator == ">=")
