import shutil

import pytest
from hub_client import connected
from hub_models import save_run


@pytest.fixture
def hub(tmp_path):
    with connected(tmp_path / "hf home") as hub:
        yield hub


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    save_run(folder)
    return folder


@pytest.fixture
def run(saved_run, tmp_path):
    """A copy of a finished run that a test may change."""
    return shutil.copytree(saved_run, tmp_path / "out" / "demo")
