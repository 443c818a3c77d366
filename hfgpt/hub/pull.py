"""From the Hub: a repository fetched into a folder, every file verified by its checksum."""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import validate_repo_id

from hfgpt.hub.repository import checksum, connect, has_checksum, repo_info
from hfgpt.hub.retry import TRIES, HubError, Log, one_line_errors, was_retried_by_the_client, with_retries
from hfgpt.system.storage import make_readable, sync, write_atomically

PULL_FILE = ".pulled.json"
"""Says, in a folder that was pulled, from where and with which checksums."""


@dataclass(frozen=True)
class Pulled:
    """What a pull did.

    Attributes:
        repo_id: the repository.
        commit: its hash on the Hub.
        files: in the folder, each with the checksum that the Hub has for it.
        is_new: False if the folder held these very files before.
    """

    repo_id: str
    commit: str
    files: int
    is_new: bool


def pull(
    repo_id: str,
    folder: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    log: Log = lambda text: None,
) -> Pulled:
    """Fetch a repository into a folder, which is whole and verified when it appears, or does not appear.

    What was fetched before a kill is not fetched again.

    Args:
        repo_id: `user/model`.
        folder: a new or empty one, or one that an earlier pull of this repository left and nobody changed.
        revision: branch, tag or commit; None is main.
        token: of the Hub; None takes that of `HF_TOKEN` or `hf auth login`.
        log: called with each message for a person.

    Raises:
        ValueError: there is no such repository or revision, or the folder holds something else. It stays as it is.
        HubError: the Hub cannot be reached, fails again and again, or a file comes damaged every time.
    """
    validate_repo_id(repo_id)
    folder = Path(folder)
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"{folder.absolute().parent} is no folder. Make it first.")
    kept = kept_files(folder, repo_id)
    with one_line_errors(repo_id):
        api = connect(token)
        info = repo_info(api, repo_id, revision, log)
        wanted = {sibling.rfilename: sibling for sibling in info.siblings or []}
        for name in wanted:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
                raise ValueError(f"{repo_id} has a file {name!r}, which would lie outside of the folder.")
        if kept.keys() == wanted.keys() and all(has_checksum(kept[name], one) for name, one in wanted.items()):
            return Pulled(repo_id, str(info.sha), len(wanted), is_new=False)
        staged = folder.absolute().parent / f".{folder.name}.pull"
        staged.mkdir(exist_ok=True)
        for name, path in kept.items():
            if name in wanted and has_checksum(path, wanted[name]) and not (staged / name).exists():
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, staged / name)
        with ThreadPoolExecutor(max_workers=4) as threads:
            list(threads.map(lambda one: fetch(api, repo_id, str(info.sha), one, staged, log), wanted.values()))
    install(staged, folder, repo_id, str(info.sha), list(wanted))
    return Pulled(repo_id, str(info.sha), len(wanted), is_new=True)


def kept_files(folder: Path, repo_id: str) -> dict[str, Path]:
    """The files that an earlier pull of this repository left in the folder; none if it is new or empty.

    Raises:
        ValueError: it holds anything else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file. Name a folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return {}
    try:
        pulled = json.loads((folder / PULL_FILE).read_text(encoding="utf-8"))
        origin, checksums = str(pulled["repo_id"]), {str(name): str(sha) for name, sha in pulled["sha256"].items()}
    except FileNotFoundError:
        raise ValueError(f"{folder} holds files of something else. Name an empty folder or a new one.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / PULL_FILE} is damaged ({type(error).__name__}). Name a new folder.") from error
    if origin != repo_id:
        raise ValueError(f"{folder} holds {origin}, not {repo_id}. Name another folder.")
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir() and path != folder / PULL_FILE):
        name = path.relative_to(folder).as_posix()
        if checksums.get(name) != (checksum(path, hashlib.sha256()) if path.is_file() else None):
            raise ValueError(f"{path} is not as it was pulled. Delete it to have it fetched, or name another folder.")
        found[name] = path
    return found


def fetch(api: HfApi, repo_id: str, commit: str, sibling: RepoSibling, folder: Path, log: Log) -> None:
    """Download one file until it has the Hub's checksum, which the client itself does not look at.

    Raises:
        HubError: it is damaged every time.
    """
    path = folder / sibling.rfilename
    for number in range(TRIES):
        if path.is_file():
            if has_checksum(path, sibling):
                return
            log(f"{sibling.rfilename} is damaged; fetching it {'again' if number else 'anew'}")
        is_again = path.is_file()

        def download(is_again: bool = is_again) -> None:
            # The forced one also passes by the cache of this machine, which may be where the damage is.
            api.hf_hub_download(repo_id, sibling.rfilename, revision=commit, local_dir=folder, force_download=is_again)

        try:
            with_retries(download, log, is_final=was_retried_by_the_client)
        except OSError as error:
            # Of another size than announced, huggingface_hub 2.4 raises a bare OSError.
            if type(error) is not OSError or error.errno is not None:
                raise
            log(f"{sibling.rfilename} came with another size than the Hub told")
    if not (path.is_file() and has_checksum(path, sibling)):
        raise HubError(f"{sibling.rfilename} of {repo_id} came damaged {TRIES} times. Nothing was changed.")


def install(staged: Path, folder: Path, repo_id: str, commit: str, names: list[str]) -> None:
    """Leave only the files of the repository, bring them to the disk, and give the folder its name."""
    for path in sorted(staged.rglob("*"), reverse=True):
        name = path.relative_to(staged).as_posix()
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif name not in names:
            path.unlink()
    shutil.rmtree(staged / ".cache", ignore_errors=True)  # what the client notes about its downloads
    checksums = {name: checksum(staged / name, hashlib.sha256()) for name in names}
    origin = {"repo_id": repo_id, "commit": commit, "sha256": checksums}
    write_atomically(staged / PULL_FILE, (json.dumps(origin, indent=2) + "\n").encode())
    make_readable(staged)
    for path in [staged, *staged.rglob("*")]:
        sync(path)
    if folder.exists() and any(folder.iterdir()):
        old = folder.absolute().parent / f".{folder.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        os.rename(staged, folder)
        shutil.rmtree(old)
    else:
        os.rename(staged, folder)
    sync(folder.absolute().parent)
