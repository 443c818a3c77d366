"""The recipes that come with hfgpt, in `hfgpt/recipes` of a wheel and beside the package in a checkout.

This module is a package as well: its modules, such as `hfgpt.config.recipes.lecture`, are in that folder.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from hfgpt.system.suggest import did_you_mean, nearest_path

PACKAGE = Path(__file__).parents[1]

USES = {
    ".": "hfgpt train NAME",
    "lecture": "hfgpt lecture",
    "lm-eval": "hfgpt evaluate MODEL --tasks NAME",
    "accelerate": 'accelerate launch --config_file "$(hfgpt recipes NAME)" -m hfgpt train demo',
}
"""What the recipes of each folder are for."""


def package_file(relative: str) -> Path:
    """Path of a file or folder that the wheel carries inside `hfgpt/`, and a checkout beside it."""
    installed = PACKAGE / relative
    return installed if installed.exists() else PACKAGE.parent / relative


__path__ = [str(package_file("recipes"))]  # makes a package of a module


@dataclass(frozen=True)
class BundledRecipe:
    """A recipe that comes with hfgpt: its file, a command that takes it, and what it is, in a line."""

    name: str
    path: Path
    use: str
    about: str


def bundled_recipes() -> list[BundledRecipe]:
    """All of them, in the order of `USES`."""
    found = []
    for folder, use in USES.items():
        for path in sorted(package_file(f"recipes/{folder}").iterdir()):
            if path.suffix in (".yaml", ".sh"):
                first = re.search(r"^# (.*)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
                found.append(BundledRecipe(path.stem, path, use, first[1] if first else ""))
    return found


def find_bundled(name: str, folder: str = ".") -> Path | None:
    """The YAML file of a name in one of the folders; None if there is none."""
    path = package_file(f"recipes/{folder}/{name}.yaml")
    return path if re.fullmatch(r"[\w-]+", name) and path.is_file() else None


def find_recipe(recipe: str | Path) -> Path:
    """Find the recipe of a run by path, or by the name of one that comes with hfgpt.

    Raises:
        ValueError: there is neither.
    """
    path = Path(os.path.expanduser(recipe))
    if path.is_file():
        return path
    bundled = find_bundled(str(recipe))
    if bundled is None:
        names = ", ".join(f"`{name}`" for name in run_recipes())
        if path.is_dir() and str(recipe) and (path / "run.yaml").is_file():
            raise ValueError(f"{str(recipe)!r} is the folder of a run. Its recipe is `{path / 'run.yaml'}`.")
        hint = did_you_mean(str(recipe), run_recipes()) or nearest_path(path)
        raise ValueError(
            f"no recipe {str(recipe)!r}: it is neither a file nor the name of a recipe here ({names}).{hint}"
        )
    return bundled


def run_recipes() -> list[str]:
    """The names of recipes that `hfgpt train` takes."""
    return sorted(path.stem for path in package_file("recipes").glob("*.yaml"))
