"""Put the tests that come with transformers' source distribution on PyPI into a folder, as a package `tests`.

They are those of the version that is installed. What they import and the distribution leaves out is added from
stand_ins/: the tests of exporting and of generation are not in it (hfgpt's own are in tests/citizen/).
"""

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

STAND_INS = Path(__file__).with_name("stand_ins")


def fetch(folder: Path) -> None:
    """Download and unpack; nothing is done if the tests of this version are there."""
    version = importlib.metadata.version("transformers")
    done = folder / "version"
    if done.is_file() and done.read_text() == version:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as downloads:
        source = ["download", "--no-deps", "--no-binary", ":all:", "--dest", downloads, f"transformers=={version}"]
        subprocess.run([*pip, *source], check=True)
        [archive] = Path(downloads).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(downloads, filter="data")
        [tests] = Path(downloads).glob("transformers-*/tests")
        shutil.copytree(tests, folder / "tests")
    shutil.copytree(STAND_INS, folder / "tests", dirs_exist_ok=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder), "parameterized"], check=True)
    done.write_text(version)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
