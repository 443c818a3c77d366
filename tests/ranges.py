"""An environment at one end of the ranges of pyproject.toml: `python tests/ranges.py newest|oldest FOLDER`.

uv chooses the newest release of every direct dependency, or the oldest, and the newest of all that these need; torch
comes without CUDA where the machine reaches PyTorch's own index, and from PyPI where not. What came is written to
FOLDER/versions.md. uv's own variables are obeyed: with `UV_OVERRIDE` and `UV_FIND_LINKS` torch alone is another one.
"""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESOLUTIONS = {"newest": "highest", "oldest": "lowest-direct"}

# Run by the new environment's Python: what pyproject.toml allows and what came, without what only lints.
TABLE = """
import platform, sys
from importlib.metadata import requires, version
from packaging.requirements import Requirement

print("| | allowed | installed |", "|---|---|---|", f"| Python | | {platform.python_version()} |", sep="\\n")
wanted = {requirement.name: requirement for requirement in map(Requirement, requires("hfgpt"))}
for name in wanted.keys() - {"hfgpt", "ruff", "mypy", "import-linter", "types-pyyaml"}:
    wanted[name] = f"| {name} | {wanted[name].specifier} | {version(name)} |"
print(*sorted(row for row in wanted.values() if isinstance(row, str)), sep="\\n")
"""


def make(end: str, folder: Path) -> str:
    """Make the environment anew and return its table of versions.

    Args:
        end: a name of `RESOLUTIONS`.
        folder: where the environment goes; what is there is removed.

    Raises:
        CalledProcessError: the ranges do not fit together, or something cannot be installed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"], check=True)
    uv, lock = [python, "-m", "uv", "pip"], str(folder / "lock.txt")
    resolve = [*uv, "compile", "--quiet", "--python", python, "--resolution", RESOLUTIONS[end], "--extra", "test"]
    resolve += ["--output-file", lock, str(ROOT / "pyproject.toml")]
    without_cuda = ["--torch-backend", "cpu"]
    if subprocess.run([*resolve, *without_cuda], stderr=subprocess.DEVNULL).returncode:
        without_cuda = []
        subprocess.run(resolve, check=True)
    install = [*uv, "install", "--quiet", "--compile-bytecode", "--python", python]
    subprocess.run([*install, *without_cuda, "--requirement", lock], check=True)
    subprocess.run([*install, "--no-deps", "--editable", str(ROOT)], check=True)
    return subprocess.run([python, "-c", TABLE], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    end, folder = sys.argv[1], Path(sys.argv[2])
    table = make(end, folder)
    (folder / "versions.md").write_text(table, encoding="utf-8")
    sys.stdout.write(table)
