"""What hfgpt's extras bring, and the command that installs a missing package into the Python that runs hfgpt.

The command names packages, not `hfgpt[extra]`, which pip would look up in a registry: hfgpt may have come from a clone,
a wheel or a URL.
"""

import importlib.metadata
import shlex
import sys
from collections.abc import Iterable
from importlib.machinery import PathFinder

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def extras() -> list[str]:
    """The names of all extras."""
    return importlib.metadata.metadata("hfgpt").get_all("Provides-Extra") or []


def requirements(extra: str | None = None) -> list[Requirement]:
    """What an extra asks for besides hfgpt; without one, what hfgpt itself asks for."""
    asked = [Requirement(text) for text in importlib.metadata.requires("hfgpt") or []]
    return [
        each
        for each in asked
        if each.name != "hfgpt"
        and (each.marker is None if extra is None else each.marker and each.marker.evaluate({"extra": extra}))
    ]


def brought_by(package: str) -> tuple[str, Requirement] | None:
    """The extra that brings a package, and its requirement; None if none does."""
    for extra in sorted(extras(), key="test".__eq__):  # which brings what all the others do
        for requirement in requirements(extra):
            if canonicalize_name(requirement.name) == canonicalize_name(package):
                return extra, requirement
    return None


def install_command(packages: Iterable[str]) -> str:
    """A command that installs packages into the environment that runs this, whether it has a pip or uv made it."""
    python = shlex.quote(sys.executable)
    has_pip = PathFinder.find_spec("pip")  # importlib.util's would let setuptools warn of distutils
    installer = f"{python} -m pip install" if has_pip else f"uv pip install --python {python}"
    return " ".join([installer, *(f'"{package}"' for package in packages)])


def needs(what: str, *packages: str) -> str:
    """Say that something needs packages that are not here, and how they come.

    Args:
        what: the subject of the sentence.
        packages: their names, or those of their modules.
    """
    found = {package: brought_by(package) for package in packages}
    extra = next((f" (extra `{each[0]}`)" for each in found.values() if each and each[0] != "test"), "")
    wanted = [f"{each[1].name}{each[1].specifier}" if each else package for package, each in found.items()]
    return f"{what} needs {' and '.join(packages)}{extra}: `{install_command(wanted)}`."
