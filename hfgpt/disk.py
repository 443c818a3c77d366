"""Writing so that a reader, a kill or a power cut never meets half of it, and so that who may read it is as usual."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replace the file by `data` in one step; its mode follows the umask, as that of any new file.

    A failure, such as a full disk, leaves the old file and nothing else.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # a fixed name: what a kill leaves behind is overwritten next time
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power cut could leave the new name without its data
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_new_file(path: Path, ending: str, overwrite: bool) -> None:
    """Refuse a name that a file should not be written under, before the work that it is for.

    Raises:
        ValueError: it ends in something else.
        FileExistsError: it exists, and is not to be overwritten.
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: it is a folder.
    """
    if path.suffix.lower() != ending:
        raise ValueError(f"{path}: the name must end in {ending}.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists. Name another file, or add `--overwrite`.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path.absolute().parent} is no folder. Make it first.")


@contextmanager
def new_path(dest: Path) -> Iterator[Path]:
    """Where to write a file or folder that gets its name only once it is whole.

    Raises:
        FileExistsError: it exists.
        FileNotFoundError: its folder does not exist.
    """
    refuse_existing(dest)
    parent = dest.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{parent} is no folder. Make it first.")
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{dest.name}.") as folder:
        staged = Path(folder) / dest.name
        yield staged
        make_readable(staged)
        for path in [staged, *staged.rglob("*")]:
            sync(path)
        refuse_existing(dest)  # once more: writing took its time
        os.rename(staged, dest)
    sync(parent)


def refuse_existing(path: Path) -> None:
    """Refuse a place that is taken, if only by a link that leads nowhere.

    Raises:
        FileExistsError: naming it.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists. Name a new one.")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_readable(path: Path) -> None:
    """Give a file, or every file in a folder, the mode that new files have; safetensors (0.8) lets only the owner."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            os.chmod(file, 0o666 & ~current_umask())


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
