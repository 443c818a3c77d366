"""Every recipe that the repository holds can be run as far as words can tell."""

from pathlib import Path

import pytest
import yaml

from hfgpt.cli.run_commands import LECTURE_STEPS
from hfgpt.config.loading import load_config
from hfgpt.config.recipes import USES, bundled_recipes, find_bundled, run_recipes

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_there_are_recipes():
    assert "demo" in {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    load_config(path)


def test_no_two_recipes_leave_the_same_folder():
    folders = [load_config(path).output_dir for path in RECIPES]

    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_is(path):
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_every_recipe_is_listed_once_with_what_it_is_and_what_takes_it():
    listed = bundled_recipes()

    names = [recipe.name for recipe in listed]
    assert len(set(names)) == len(names)
    there = {path for path in (ROOT / "recipes").rglob("*") if path.suffix in (".yaml", ".sh")}
    assert {recipe.path for recipe in listed} == there
    assert {recipe.use for recipe in listed} == {*USES.values()}
    for recipe in listed:
        assert 20 < len(recipe.about) < 120
        assert recipe.about[-1] == "."


def test_recipes_of_runs_are_those_beside_one_another():
    assert run_recipes() == sorted(path.stem for path in RECIPES)


def test_a_name_leads_nowhere_else():
    assert find_bundled("license", "lm-eval") == ROOT / "recipes" / "lm-eval" / "license.yaml"
    assert find_bundled("license") is None
    assert find_bundled("lm-eval/license") is None
    assert find_bundled("../recipes/demo") is None


def test_a_task_of_lm_eval_has_the_name_of_its_file():
    for path in (ROOT / "recipes" / "lm-eval").iterdir():
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["task"] == path.stem


def test_the_steps_that_the_command_line_knows_are_those_of_the_lecture():
    from hfgpt.config.recipes.lecture.steps import STEPS

    assert tuple(STEPS) == LECTURE_STEPS
