"""Every recipe that the repository holds can be run as far as words can tell."""

from pathlib import Path

import pytest

from hfgpt.config import load_config
from hfgpt.optim import check_optim

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def test_there_are_recipes():
    assert "demo" in {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    config = load_config(path)

    check_optim(config.optim)


def test_no_two_recipes_leave_the_same_folder():
    folders = [load_config(path).output_dir for path in RECIPES]

    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_is(path):
    assert path.read_text(encoding="utf-8").startswith("# ")
