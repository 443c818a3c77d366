"""Who may read what was written: as for any new file, the umask decides. safetensors (0.8) lets only the owner."""

import os
from pathlib import Path


def make_readable(path: Path) -> None:
    """Give a file, or every file in a folder, the mode that new files have."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            os.chmod(file, 0o666 & ~current_umask())


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
