"""A repository on the Hub: what it holds, and whether a file here is the same."""

import hashlib
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from hfgpt import __version__
from hfgpt.hub.retry import Log, with_retries
from hfgpt.system.network import limit_waiting


def connect(token: str | None) -> HfApi:
    """The Hub's client."""
    limit_waiting()
    return HfApi(token=token, library_name="hfgpt", library_version=__version__)


def repo_info(api: HfApi, repo_id: str, revision: str | None, log: Log) -> ModelInfo:
    """A repository at a revision, with every file's checksum."""
    return with_retries(lambda: api.model_info(repo_id, revision=revision, files_metadata=True), log)


def has_checksum(source: Path | bytes, sibling: RepoSibling) -> bool:
    """Whether a file is the Hub's: by SHA-256 where it is stored as a large one, else by git's SHA-1."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size != sibling.size:
        return False
    if sibling.lfs is not None:
        return checksum(source, hashlib.sha256()) == sibling.lfs.sha256
    return checksum(source, hashlib.sha1(b"blob %d\0" % size)) == sibling.blob_id


def checksum(source: Path | bytes, digest: Any) -> str:
    if isinstance(source, bytes):
        digest.update(source)
        return digest.hexdigest()
    with source.open("rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()
