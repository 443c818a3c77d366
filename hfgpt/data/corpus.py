"""Which files are the text of a run: those that paths, folders and data sets name, and what of a folder is no text."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfgpt.data.readers import COMPRESSIONS, TextFile, read_texts
from hfgpt.system.console import print_status

FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""How files are read: keys of `hfgpt.data.readers.READERS`."""
ENDINGS = f"{', '.join(FORMATS)} (text, also with {', '.join(COMPRESSIONS)} behind)"

HIDDEN_FOLDERS = {"__MACOSX", "__pycache__", "CVS", "@eaDir", "$RECYCLE.BIN", "lost+found"}
ABOUT_THE_TEXT = re.compile(
    r"(readme|licen[sc]e|copying)(\.\w+)*|dataset_(infos?|dict)\.json|state\.json", flags=re.IGNORECASE
)
"""Names of cards, licences and notes, which lie beside a text and are none of it."""
SAVED, SAVED_SPLITS = ("state.json", "dataset_info.json"), "dataset_dict.json"
"""What `save_to_disk` leaves in the folder of a data set, and of one with splits."""


@dataclass
class Corpus:
    """The files of a text, in order, and what was left out beside them: names by reason."""

    files: list[TextFile] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, name: str) -> None:
        self.left_out.setdefault(reason, []).append(name)

    def describe_left_out(self) -> str:
        """One line: how many files, and why, with the first names of each reason."""
        count = sum(map(len, self.left_out.values()))
        reasons = [f"{len(names):,} {reason} ({list_some(names)})" for reason, names in self.left_out.items()]
        return f"left out of the text: {count:,} file{'' if count == 1 else 's'}: {'; '.join(reasons)}"


def list_some(names: list[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def file_kind(name: str) -> str | None:
    """How a file of that name is read; None if it is not."""
    lowered = name.lower()
    for ending in COMPRESSIONS:
        if lowered.endswith(ending):
            kind = FORMATS.get(Path(lowered.removesuffix(ending)).suffix)
            return None if kind in ("parquet", "arrow") else kind  # these are packed inside
    return FORMATS.get(Path(lowered).suffix)


def find_files(files: Any) -> Corpus:
    """List the files that paths and folders name, in this order, folders in sorted order.

    A file that is named is read whatever its name begins with. Of a folder, what is hidden, is a card or a licence,
    or is of another kind is left out. A folder of `save_to_disk` is its own files.

    Raises:
        ValueError: a path that does not exist, a file of an unknown kind, or a folder without any of a known one.
    """
    entries = files if isinstance(files, list | tuple) else [files]
    if not entries or not all(isinstance(entry, str | Path) for entry in entries):
        raise ValueError(f"`data.files` and `data.validation_files` must be a path or a list of paths, got {files!r}.")
    corpus = Corpus()
    for entry in map(Path, entries):
        if entry.is_dir():
            add_folder(corpus, entry)
        elif not entry.is_file():
            raise ValueError(f"there is no file or folder {str(entry)!r}.")
        else:
            kind = file_kind(entry.name)
            if kind is None:
                raise ValueError(f"{entry}: the name must end in one of {ENDINGS}, got {entry.suffix!r}.")
            corpus.files.append(TextFile(str(entry), str(entry), kind))
    return corpus


def add_folder(corpus: Corpus, folder: Path) -> None:
    """Add the files below a folder, links to folders followed."""
    found: list[Path] = []
    visited: set[str] = set()
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in visited:  # a link to a folder that holds it
            subfolders.clear()
            continue
        visited.add(os.path.realpath(parent))
        if is_saved(Path(parent)):
            found += saved_files(Path(parent))
            subfolders.clear()
            continue
        for name in names:
            path = Path(parent, name)
            inner = str(path.relative_to(folder))
            if is_hidden(inner):
                if file_kind(name) is not None:
                    corpus.leave_out("hidden", inner)
            elif file_kind(name) is None:
                corpus.leave_out("of another kind", inner)
            elif ABOUT_THE_TEXT.fullmatch(name):
                corpus.leave_out("about the text, not of it", inner)
            elif path.suffix.lower() in COMPRESSIONS and path.stem in names:
                corpus.leave_out("there unpacked as well", inner)
            elif not path.is_file():
                corpus.leave_out("a link to nothing", inner)
            else:
                found.append(path)
    if not found:
        left_out = f" {corpus.describe_left_out()}." if corpus.left_out else ""
        raise ValueError(f"the folder {folder} holds no file that ends in {ENDINGS}.{left_out}")
    corpus.files += [TextFile(str(path), str(path), str(file_kind(path.name))) for path in sorted(found)]


def is_hidden(inner: str) -> bool:
    """Whether a path below a folder leads through what people do not see there."""
    parts = Path(inner).parts
    return any(part.startswith((".", "~$")) or part in HIDDEN_FOLDERS for part in parts)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder as one split.

    Raises:
        ValueError: it wrote several.
    """
    splits = saved_splits(folder)
    if len(splits) > 1:
        raise ValueError(
            f"{folder} holds the splits {splits} of a data set. Name one, such as {folder / splits[0]}, or set "
            f"`data.source={folder} data.split={splits[0]}`."
        )
    return all((folder / name).is_file() for name in SAVED)


def saved_splits(folder: Path) -> list[str]:
    path = folder / SAVED_SPLITS
    return list(read_note(path, "splits")) if path.is_file() else []


def saved_files(folder: Path) -> list[Path]:
    return [folder / each["filename"] for each in read_note(folder / SAVED[0], "_data_files")]


def read_note(path: Path, key: str) -> list[Any]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))[key])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not as `save_to_disk` writes it: {error!r}.") from error


def leave_out_empty(corpus: Corpus, column: str) -> None:
    """Leave out the files without any text, of which each is opened.

    Raises:
        ValueError: none is left, or the beginning of a file cannot be read.
    """
    filled = []
    for file in corpus.files:
        if is_filled(file, column):
            filled.append(file)
        else:
            corpus.leave_out("empty", file.name)
    if not filled:
        names = [file.name for file in corpus.files]
        verb = "is" if len(names) == 1 else "are"
        raise ValueError(f"{list_some(names)} {verb} empty: there is no text to read.")
    corpus.files = filled


def is_filled(file: TextFile, column: str) -> bool:
    """Whether there is any text in a file on this machine."""
    if os.path.getsize(file.path) == 0:  # which no reader of tables takes
        return False
    is_plain = file.kind == "text" and not file.is_compressed
    return is_plain or next(read_texts(file, column), None) is not None


def print_left_out(corpus: Corpus) -> None:
    """Say what was left out, if anything was."""
    if corpus.left_out:
        print_status(corpus.describe_left_out())
