"""The notebooks hold their outputs, say the same in both languages, and run."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "recipes" / "notebooks").glob("*.ipynb"))


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def test_there_is_one_in_english_and_one_in_korean():
    assert [path.name for path in NOTEBOOKS] == ["first-steps.ipynb", "first-steps.ko.ipynb"]
    assert all(re.search("[가-힣]", source(cell)) for cell in cells(NOTEBOOKS[1], "markdown"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_to_its_end_and_is_small(path):
    outputs = [output for cell in cells(path, "code")[1:] for output in cell["outputs"]]

    assert all(cell["outputs"] for cell in cells(path, "code")[1:])  # the first is the installation
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png;base64" in str(output) for output in outputs) == 3
    assert path.stat().st_size < 600_000
    assert not re.search(r"/(home|root|tmp|Users|work)/", path.read_text(encoding="utf-8"))


def test_both_have_the_same_code_but_for_texts():
    english, korean = ([source(cell) for cell in cells(path, "code")] for path in NOTEBOOKS)

    assert len(english) == len(korean)
    assert sum(one == other for one, other in zip(english, korean, strict=True)) >= len(english) - 3


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)

    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()

    assert (tmp_path / "out" / "notebook-own" / "model.safetensors").is_file()
