"""Whoever lacks a package is told the command that brings it to the Python that runs hfgpt."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hfgpt.system import extras
from hfgpt.system.extras import brought_by, install_command, needs

ROOT = Path(__file__).parents[2]


def test_what_is_missing_is_named_with_its_versions_and_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/my envs/one/bin/python")

    said = needs("ONNX", "onnx", "onnxscript")

    assert re.fullmatch(
        r"ONNX needs onnx and onnxscript \(extra `onnx`\): "
        r"`'/my envs/one/bin/python' -m pip install \"onnx>=[\d.]+\" \"onnxscript>=[\d.]+\"`\.",
        said,
    )


def test_a_package_that_no_extra_of_a_user_brings_is_named_alone():
    assert needs("this", "wandb").startswith("this needs wandb: `")
    assert needs("`--verify`", "onnxruntime").startswith("`--verify` needs onnxruntime: `")
    assert needs("`--verify`", "onnxruntime").count("onnxruntime>=") == 1


def test_a_module_is_found_under_the_name_of_its_package():
    assert brought_by("lm_eval")[0] == "neighbours"
    assert brought_by("google_crc32c")[1].name == "google-crc32c"
    assert brought_by("trackio")[0] == "trackers"
    assert brought_by("pytest")[0] == "test"
    assert brought_by("no_such_module") is None


def test_the_command_installs_into_the_python_that_gave_it(tmp_path):
    (tmp_path / "here").mkdir()
    package = tmp_path / "here" / "nothing_at_all"
    package.mkdir()
    (package / "pyproject.toml").write_text('[project]\nname = "nothing-at-all"\nversion = "1"\n')

    command = install_command([str(package)]) + " --dry-run --no-build-isolation --no-index --quiet --report -"

    said = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert sys.executable in command
    assert "nothing-at-all" in said.stdout, said.stderr


def test_where_there_is_no_pip_the_command_is_that_of_uv(monkeypatch):
    monkeypatch.setattr(extras.PathFinder, "find_spec", lambda name: None)

    assert install_command(["gguf>=0.17"]) == f'uv pip install --python {sys.executable} "gguf>=0.17"'


@pytest.mark.parametrize("folder", ["hfgpt", "cards", "recipes"])
def test_nothing_else_says_how_to_install(folder):
    told = {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".yaml") and "pip install" in path.read_text(encoding="utf-8")
    }

    assert told <= {"hfgpt/system/extras.py", "hfgpt/configuration_hfgpt.py"}  # the second travels without the first
