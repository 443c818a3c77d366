"""Which files a data set of the Hub is made of, as `datasets` finds them; readers.py reads them."""

import hashlib
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from huggingface_hub import hf_hub_download

from hfgpt.data.corpus import Corpus, is_saved, saved_files, saved_splits
from hfgpt.data.readers import TextFile
from hfgpt.system.network import limit_waiting
from hfgpt.system.storage import write_json

KINDS = {"text": "lines", "json": "json", "csv": "csv", "parquet": "parquet", "arrow": "arrow"}
"""Loaders of `datasets` whose files hfgpt reads, and as what."""
FOLLOWED = {"name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter", "sample_by"}
"""Options of a data set's card that hfgpt follows, or that change no text."""


def find_source(source: str, name: str | None, split: str) -> Corpus:
    """List the files of one split.

    Args:
        source: Hub id, or a folder that is laid out like a repository or was written by `save_to_disk`.
        name: of its configuration; None is the only one, or the default.
        split: of the configuration.

    Raises:
        ValueError: there is no such data set, configuration or split, or its files are of a kind that is not read.
    """
    saved = find_saved(Path(source), split)
    if saved is not None:
        return Corpus([TextFile(str(path), str(path), "arrow") for path in saved])
    found = find_splits(source, name)
    check_split(source, split, list(found["splits"]))
    paths = found["splits"][split]
    return Corpus([TextFile(shorten_address(path), path, found["kind"]) for path in paths])


def check_split(source: str, split: str, splits: list[str]) -> None:
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}, only {splits}. Set `data.split`.")


def find_saved(folder: Path, split: str) -> list[Path] | None:
    """The files of a split in a folder that `save_to_disk` wrote; None if it is another folder, or none."""
    splits = saved_splits(folder)
    if splits:
        check_split(str(folder), split, splits)
        return saved_files(folder / split)
    if not is_saved(folder):
        return None
    check_split(str(folder), split, ["train"])
    return saved_files(folder)


def find_splits(source: str, name: str | None) -> dict[str, Any]:
    """The files by split, and their kind; what was found is noted, for when the Hub cannot be reached."""
    limit_waiting()
    key = hashlib.sha256(repr((source, name)).encode()).hexdigest()[:32]
    note = Path(datasets.config.HF_DATASETS_CACHE) / "hfgpt-sources" / f"{key}.json"
    try:
        builder = datasets.load_dataset_builder(source, name)
        found: dict[str, Any] = {"kind": choose_kind(builder, source)}
    except (DatasetsError, OSError, ValueError) as error:
        if isinstance(error, ConnectionError) and note.is_file():
            return dict(json.loads(note.read_text(encoding="utf-8")))
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{source} cannot be read: {reason}") from error
    found["splits"] = {str(split): list(paths) for split, paths in builder.config.data_files.items()}
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, found)
    return found


def choose_kind(builder: datasets.DatasetBuilder, source: str) -> str:
    """How the files of a data set are read.

    Raises:
        ValueError: hfgpt does not read them, or not as the data set's card asks for.
    """
    modules = [cls.__module__ for cls in type(builder).__mro__ if "packaged_modules" in cls.__module__]
    loader = modules[0].rpartition(".")[2] if modules else "code"
    if loader not in KINDS:
        raise ValueError(f"it is stored as {loader}, hfgpt reads {', '.join(KINDS)}.")
    config, plain = builder.config, type(builder.config)()
    changed = [
        each.name
        for each in fields(config)
        if each.name not in FOLLOWED and getattr(config, each.name) != getattr(plain, each.name)
    ]
    if changed:
        raise ValueError(f"its card sets {changed}, which hfgpt does not follow. Save its text as .parquet.")
    if loader == "csv" and config.sep != ",":
        if config.sep != "\t":
            raise ValueError(f"its fields are separated by {config.sep!r}, hfgpt reads ',' and tabs.")
        return "tsv"
    if loader == "text" and config.sample_by != "line":
        if config.sample_by != "document":
            raise ValueError(f"its card cuts texts by {config.sample_by}, hfgpt by line or document.")
        return "text"
    return KINDS[loader]


def shorten_address(path: str) -> str:
    """An address on the Hub as `user/set: file`; a path as it is."""
    found = match_address(path)
    return f"{found['repo']}: {found['file']}" if found else path


def match_address(path: str) -> re.Match[str] | None:
    return re.fullmatch(r"hf://datasets/(?P<repo>[^@]+)@(?P<revision>[^/]+)/(?P<file>.+)", path)


def download(corpus: Corpus) -> Corpus:
    """Bring the files onto this machine, into the Hub's cache, where they are found again without the Hub.

    Raises:
        ValueError: a file cannot be fetched.
    """
    return replace(corpus, files=[TextFile(file.name, fetch(file), file.kind) for file in corpus.files])


def fetch(file: TextFile) -> str:
    if not file.is_remote:
        return file.path
    found = match_address(file.path)
    try:
        if found is None:  # a card may name files anywhere
            return str(datasets.DownloadManager().download(file.path))
        return hf_hub_download(found["repo"], found["file"], repo_type="dataset", revision=found["revision"])
    except OSError as error:
        raise ValueError(f"{file.name} cannot be fetched: {' '.join(str(error).split())}") from error
