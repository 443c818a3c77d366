import pytest
import torch
from manners import KINDS, STRANGERS

from hfgpt.adopt.constructor import find_constructor
from hfgpt.adopt.folder import load_file, package_of
from hfgpt.adopt.source import Program


@pytest.fixture
def take_out(tmp_path):
    """A function that takes a stranger's class out of its file, and imports it from where it was put."""
    packages = []

    def take(kind, class_name=None, **changes):
        what, values = KINDS[kind]
        file, _, name = what.partition(":")
        values = {**values, **changes}
        program = Program(STRANGERS / file, class_name or name, values if "script" in kind else {}, set())
        folder = tmp_path / "code"
        folder.mkdir()
        program.write(folder)
        package = package_of(folder)
        packages.append(package)
        home = load_file(package.__enter__(), program.main.stem)
        taken = getattr(home, class_name or name)
        values = {key: value for key, value in values.items() if key not in program.replaced}
        return taken, find_constructor(taken, home, values), program

    yield take
    for package in packages:
        package.__exit__(None, None, None)


@pytest.fixture
def single_file(take_out):
    """A module made of a dataclass, every parameter drawn."""
    taken, constructor, _ = take_out("a dataclass")
    torch.manual_seed(0)
    return constructor.build(taken).eval()
