"""Files and folders that are complete or absent, even after a kill or a power cut; manifests with checksums."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
    """Refuse a path that a file should not be written to, before the work that makes its content.

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
    """Yield a temporary path to write a file or folder at, which is renamed to `dest` once it is complete.

    Raises:
        FileExistsError: it exists.
        FileNotFoundError: its folder does not exist.
    """
    check_absent(dest)
    parent = dest.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{parent} is no folder. Make it first.")
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{dest.name}.") as folder:
        staged = Path(folder) / dest.name
        yield staged
        make_readable(staged)
        for path in [staged, *staged.rglob("*")]:
            sync(path)
        check_absent(dest)  # once more: writing took its time
        os.rename(staged, dest)
    sync(parent)


def check_absent(path: Path) -> None:
    """Refuse a path that exists, also as a broken link."""
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


MANIFEST = "manifest.json"


def seal(manifest: dict[str, Any]) -> str:
    """The manifest as JSON, with a checksum of its own content in it."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=2) + "\n"


def unseal(text: str) -> dict[str, Any]:
    """The manifest that `seal` was given, if it has not changed since."""
    manifest = json.loads(text)
    digest = manifest.pop("sha256")
    if hashlib.sha256(json.dumps(manifest).encode()).hexdigest() != digest:
        raise ValueError("its content does not match its checksum")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; its `files` are name -> size in bytes and sha256.

    Raises:
        ValueError: it is not what was written.
    """
    path = folder / MANIFEST
    try:
        manifest = unseal(path.read_text(encoding="utf-8"))
        manifest["files"] = {
            str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}.") from error
    return manifest


def amended_manifest(folder: Path, contents: Mapping[str, bytes]) -> bytes:
    """The manifest of a folder after these of its files got this content.

    Raises:
        ValueError: it is not what was written.
    """
    manifest = read_manifest(folder)
    digests = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()}
    files = dict(sorted((manifest["files"] | digests).items()))
    entries = {name: {"size": size, "sha256": digest} for name, (size, digest) in files.items()}
    return seal({**manifest, "files": entries}).encode()


def check_files(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compare files of a folder with its manifest.

    Args:
        folder: that has one.
        names: of the files; None means all that it lists.

    Raises:
        ValueError: naming the first that is missing, strange or not what was written.
    """
    files = read_manifest(folder)["files"]
    for name in files if names is None else names:
        path = folder / name
        if name not in files:
            raise ValueError(f"{path} is not in {MANIFEST}: it was put there later.")
        if not path.is_file():
            raise ValueError(f"{path} is missing.")
        size, digest = files[name]
        if path.stat().st_size != size or sha256(path) != digest:
            raise ValueError(f"{path} is damaged: it is not what was written.")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON; the file is there as a whole or as it was before.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    write_atomically(path, encode_json(obj, f"in {Path(path).name}", indent=2) + b"\n")


def encode_json(obj: Any, where: str, indent: int | None = None) -> bytes:
    for name, number in non_finite_numbers(obj):
        raise ValueError(
            f"`{name}` is {number} {where}, and JSON has no such number. The run has diverged: lower "
            "`optim.learning_rate`, or look for what is odd in the data."
        )
    return json.dumps(obj, ensure_ascii=False, allow_nan=False, indent=indent).encode()


def non_finite_numbers(obj: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Dotted name and value of every NaN and infinity inside dictionaries and lists."""
    if isinstance(obj, float) and not math.isfinite(obj):
        yield name, obj
    elif isinstance(obj, Mapping | list | tuple):
        for key, value in obj.items() if isinstance(obj, Mapping) else enumerate(obj):
            yield from non_finite_numbers(value, f"{name}.{key}" if name else str(key))
