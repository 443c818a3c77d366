import pytest

BASE = """\
data: {source: pydoc}
train: {max_steps: 100}
"""


@pytest.fixture
def recipe(tmp_path):
    """A function that writes a recipe and returns its path."""

    def write(content=BASE):
        path = tmp_path / "recipe.yaml"
        path.write_text(content, encoding="utf-8")
        return path

    return write
