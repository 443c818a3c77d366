"""What an installed hfgpt carries: its code, and the files that it reads as data."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from release_check import check_contents

import hfgpt.config.recipes
from hfgpt.config.loading import load_config
from hfgpt.config.recipes import package_file
from hfgpt.results.card import TEMPLATE

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FORCE_INCLUDE = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]


def test_every_file_that_the_wheel_takes_from_beside_the_code_is_there():
    assert FORCE_INCLUDE.keys() == {"recipes", "cards/model_card.md", "cards/sentences.jinja"}
    for source, target in FORCE_INCLUDE.items():
        assert (ROOT / source).exists()
        assert target == f"hfgpt/{source}"  # where `package_file` looks for it


def test_a_file_is_found_beside_the_package_in_a_checkout():
    assert package_file("recipes/demo.yaml") == ROOT / "recipes" / "demo.yaml"


def test_a_file_is_found_inside_the_package_when_installed(tmp_path, monkeypatch):
    installed = tmp_path / "hfgpt" / "recipes" / "demo.yaml"
    installed.parent.mkdir(parents=True)
    installed.write_bytes((ROOT / "recipes" / "demo.yaml").read_bytes())
    monkeypatch.setattr(hfgpt.config.recipes, "PACKAGE", tmp_path / "hfgpt")

    assert package_file("recipes/demo.yaml") == installed
    assert load_config("demo").output_dir == "out/demo"


def test_the_version_stands_in_one_way_only():
    assert PROJECT["project"]["version"] == hfgpt.__version__


def requirements():
    """Every direct dependency that the package or its extras name, by name."""
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    return {requirement.name.lower(): requirement for group in groups for requirement in map(Requirement, group)}


def test_what_the_tests_are_pinned_to_lies_in_the_ranges_and_every_range_has_a_pin():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))

    for name, requirement in requirements().items():
        if name != "hfgpt":
            assert requirement.specifier.contains(pins[name]), f"{requirement} and {pins[name]}"


def test_every_range_begins_somewhere_so_that_its_oldest_release_can_be_tried():
    for name, requirement in requirements().items():
        if name not in ("hfgpt", "types-pyyaml"):
            assert any(part.operator == ">=" for part in requirement.specifier), str(requirement)


def test_the_newest_transformers_that_counts_as_tried_is_the_one_that_the_tests_are_pinned_to():
    [pin] = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("transformers==")]

    assert pin.removeprefix("transformers==").rpartition(".")[0] == ".".join(map(str, hfgpt.NEWEST_TRIED))


def test_the_package_explains_every_public_name():
    for name in set(hfgpt.__all__) - {"__version__"}:
        assert name in hfgpt.__doc__
        assert getattr(hfgpt, name).__doc__.startswith(tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ`"))
    for command in ("hfgpt --help", "load_config"):
        assert command in hfgpt.__doc__


def test_a_release_runs_no_action_that_could_change_and_has_no_right_that_it_does_not_use():
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    parsed = yaml.safe_load(workflow)

    used = re.findall(r"uses: (\S+)(.*)", workflow)
    assert len(used) >= 5
    for action, comment in used:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action)
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment)
    assert parsed[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` so
    assert parsed["permissions"] == {}
    assert {name: job["permissions"] for name, job in parsed["jobs"].items()} == {
        "build": {"contents": "read"},
        "attest": {"attestations": "write", "id-token": "write"},
        "publish": {"id-token": "write"},
    }
    assert "secrets." not in workflow


@pytest.mark.slow
def test_a_wheel_carries_the_code_and_every_recipe_and_they_are_found_there(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("hfgpt-*.whl")

    check_contents(wheel)

    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    assert (installed / "hfgpt" / TEMPLATE).read_bytes() == (ROOT / TEMPLATE).read_bytes()
    paths = [
        subprocess.run([sys.executable, *words], cwd=installed, check=True, capture_output=True, text=True).stdout
        for words in (
            ["-m", "hfgpt", "recipes", "demo"],
            ["-m", "hfgpt", "recipes", "slurm"],
            ["-c", "import hfgpt.config.recipes.lecture as lecture; print(lecture.__file__)"],
        )
    ]
    recipes = installed / "hfgpt" / "recipes"
    assert [Path(path.strip()) for path in paths] == [
        recipes / "demo.yaml",
        recipes / "accelerate" / "slurm.sh",
        recipes / "lecture" / "__init__.py",
    ]
