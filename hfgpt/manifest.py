"""What a folder says of its own files, their sizes and sha256, so that one that has changed since is seen."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def seal(manifest: dict[str, Any]) -> str:
    """The manifest as JSON, with a checksum of its own content in it."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=2) + "\n"


def unseal(text: str) -> dict[str, Any]:
    """What `seal` was given.

    Raises:
        ValueError: it is not that any more.
    """
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
    """What the manifest of a folder has to say once these of its files have this content.

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
