"""To the Hub and back: push sends a model folder in one commit, pull fetches a repository and checks every file.

huggingface_hub gives up at the first hiccup of a commit, and takes a download for good when its size is right.
"""

import hashlib
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import validate_repo_id

from hfgpt import __version__
from hfgpt.patience import TRIES, HubError, Say, one_line_errors, patiently, was_retried_by_the_client
from hfgpt.sharing import WEIGHTS, Plan, plan_push
from hfgpt.system.network import limit_waiting
from hfgpt.system.storage import make_readable, sync, write_atomically

PULL_FILE = ".pulled.json"
"""Says, in a folder that was pulled, from where and with which checksums."""


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        repo_id: the repository.
        commit: its hash on the Hub.
        url: where to look at it.
        is_new: False if the Hub held these very files before.
        pull_request: the ref of the pull request that was opened, such as `refs/pr/1`.
    """

    repo_id: str
    commit: str
    url: str
    is_new: bool
    pull_request: str | None = None


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


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    message: str = "Upload model",
    token: str | None = None,
    own_code: bool = False,
    say: Say = lambda text: None,
) -> Pushed:
    """Send a model folder to the Hub, in one commit, or in none if the Hub holds the same files.

    It may be killed and started again at any time: what arrived is not sent twice.

    Args:
        folder: see `plan_push`.
        repo_id: `user/model` or `organisation/model`; made if there is none.
        private: whether a new repository is private; None leaves it to the organisation's default, else public.
        revision: branch to commit to, made from main if there is none; None is main.
        create_pr: open a pull request instead of committing to main.
        tag: name to give the commit.
        message: of the commit.
        token: of the Hub; None takes that of `HF_TOKEN` or `hf auth login`.
        own_code: see `plan_push`.
        say: hears what is going on.

    Raises:
        ValueError: the folder must not go, see `plan_push`; the repository is not as private as was asked for; the tag
            is taken; there is no token, or it may not write there.
        HubError: the Hub cannot be reached, fails again and again, or has a newer commit than when the push began.
    """
    check_target(repo_id, revision, create_pr, tag)
    plan = plan_push(folder, token, own_code)
    return send(
        plan,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        tag=tag,
        message=message,
        token=token,
        say=say,
    )


def check_target(repo_id: str, revision: str | None, create_pr: bool, tag: str | None) -> None:
    """Refuse a target that makes no sense, before anything else takes time.

    Raises:
        ValueError: the name is none, or a pull request has what has no effect.
    """
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} is no repository. Name it as `user/model`.")
    validate_repo_id(repo_id)
    if create_pr and (revision is not None or tag is not None):
        raise ValueError("a pull request goes to main and has no tag: leave out the revision and the tag.")


def send(
    plan: Plan,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    message: str = "Upload model",
    token: str | None = None,
    say: Say = lambda text: None,
) -> Pushed:
    """Send what a plan says; see `push`."""
    for note in plan.notes:
        say(note)
    with one_line_errors(repo_id):
        if (token or get_token()) is None:
            raise ValueError("there is no token for the Hub. Run `hf auth login`, or set HF_TOKEN.")
        target = Target(repo_id, revision, create_pr, connect(token), say)
        target.make(private)
        head = target.look(revision)
        if tag is not None:
            target.refuse_other_tag(tag, plan)
        if holds(head, plan):
            commit, is_new, pull_request = str(head.sha), False, None
        else:
            commit, pull_request = target.commit(plan, head, message)
            is_new = True
        if tag is not None:
            patiently(lambda: target.api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True), say)
    return Pushed(repo_id, commit, f"{target.api.endpoint}/{repo_id}/commit/{commit}", is_new, pull_request)


def connect(token: str | None) -> HfApi:
    """The Hub's client."""
    limit_waiting()
    return HfApi(token=token, library_name="hfgpt", library_version=__version__)


@dataclass(frozen=True)
class Target:
    """Where a push goes."""

    repo_id: str
    revision: str | None
    create_pr: bool
    api: HfApi
    say: Say

    def look(self, revision: str | None) -> ModelInfo:
        """The repository as it is now, with every file's checksum."""
        return look(self.api, self.repo_id, revision, self.say)

    def make(self, private: bool | None) -> None:
        """Make the repository and the branch where there are none.

        Raises:
            ValueError: the repository is there, and not as private as it should be.
        """
        patiently(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True), self.say)
        is_private = self.look(None).private
        if private is not None and private != is_private:
            raise ValueError(
                f"{self.repo_id} exists and is {'private' if is_private else 'public'}. Change that in its settings on "
                f"the Hub, or leave out `--{'private' if private else 'public'}`."
            )
        branch = self.revision
        if branch not in (None, "main") and not str(branch).startswith("refs/"):
            patiently(lambda: self.api.create_branch(self.repo_id, branch=str(branch), exist_ok=True), self.say)

    def refs(self) -> dict[str, str]:
        """Ref -> commit, of branches, tags and pull requests."""
        found = patiently(lambda: self.api.list_repo_refs(self.repo_id, include_pull_requests=True), self.say)
        return {ref.ref: ref.target_commit for ref in [*found.branches, *found.tags, *(found.pull_requests or [])]}

    def refuse_other_tag(self, tag: str, plan: Plan) -> None:
        """Refuse a tag that names other files already.

        Raises:
            ValueError: it does.
        """
        commit = self.refs().get(f"refs/tags/{tag}")
        if commit is not None and not holds(self.look(commit), plan):
            raise ValueError(
                f"the tag {tag!r} of {self.repo_id} names another commit, {commit[:8]}. Take another name."
            )

    def commit(self, plan: Plan, head: ModelInfo, message: str) -> tuple[str, str | None]:
        """Make one commit on top of `head`; returns it and the pull request's ref, if that was asked for.

        An answer can be lost after the commit was made. So before anything is tried again, the Hub is asked whether
        it holds the files by now.
        """
        pulls_before = set(self.refs()) if self.create_pr else set()
        stale = outdated_weights(head, plan)
        is_first = True

        def attempt() -> tuple[str, str | None]:
            nonlocal is_first
            if not is_first:
                landed = self.landed(plan, pulls_before)
                if landed is not None:
                    return landed
            is_first = False
            # Made anew for each try: what the client notes in them of an earlier one would be out of date.
            operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=at) for name, at in plan.goes.items()]
            done = self.api.create_commit(
                self.repo_id,
                [*operations, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
                commit_message=message,
                revision=self.revision,
                create_pr=self.create_pr,
                parent_commit=head.sha,
            )
            return done.oid, done.pr_revision

        for name in stale:
            self.say(f"{name} of an earlier model is removed")
        try:
            commit, pull_request = patiently(attempt, self.say, is_final=was_retried_by_the_client)
        except HfHubHTTPError as error:
            if error.response.status_code != 412:
                raise
            landed = self.landed(plan, pulls_before)
            if landed is None:
                newer = self.look(self.revision).sha
                raise HubError(
                    f"{self.repo_id} has a newer commit, {str(newer)[:8]}, than when this push began, "
                    f"{str(head.sha)[:8]}. Nothing was overwritten. Look at it, then push again."
                ) from error
            commit, pull_request = landed
        if not holds(self.look(commit), plan):
            raise HubError(f"{self.repo_id} does not hold what was sent, at {commit[:8]}. Push again.")
        return commit, pull_request

    def landed(self, plan: Plan, pulls_before: set[str]) -> tuple[str, str | None] | None:
        """The commit, and the pull request, that hold the files by now; None if there is none."""
        if not self.create_pr:
            head = self.look(self.revision)
            return (str(head.sha), None) if holds(head, plan) else None
        for ref, commit in self.refs().items():
            if ref.startswith("refs/pr/") and ref not in pulls_before and holds(self.look(ref), plan):
                return commit, ref
        return None


def look(api: HfApi, repo_id: str, revision: str | None, say: Say) -> ModelInfo:
    """A repository at a revision, with every file's checksum."""
    return patiently(lambda: api.model_info(repo_id, revision=revision, files_metadata=True), say)


def holds(info: ModelInfo, plan: Plan) -> bool:
    """Whether a repository has all that goes, to the last bit, and no weights besides."""
    there = {sibling.rfilename: sibling for sibling in info.siblings or []}
    is_there = all(name in there and has_checksum(source, there[name]) for name, source in plan.goes.items())
    return is_there and not outdated_weights(info, plan)


def outdated_weights(info: ModelInfo, plan: Plan) -> list[str]:
    """Weights in a repository that this model does not have: transformers would load an old whole before new shards."""
    names = [sibling.rfilename for sibling in info.siblings or []]
    return [name for name in names if name not in plan.goes and any(fnmatch(name, pattern) for pattern in WEIGHTS)]


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


def pull(
    repo_id: str,
    folder: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    say: Say = lambda text: None,
) -> Pulled:
    """Fetch a repository into a folder, which is whole and verified when it appears, or does not appear.

    What was fetched before a kill is not fetched again.

    Args:
        repo_id: `user/model`.
        folder: a new or empty one, or one that an earlier pull of this repository left and nobody changed.
        revision: branch, tag or commit; None is main.
        token: of the Hub; None takes that of `HF_TOKEN` or `hf auth login`.
        say: hears what is going on.

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
        info = look(api, repo_id, revision, say)
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
            list(threads.map(lambda one: fetch(api, repo_id, str(info.sha), one, staged, say), wanted.values()))
    settle(staged, folder, repo_id, str(info.sha), list(wanted))
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


def fetch(api: HfApi, repo_id: str, commit: str, sibling: RepoSibling, folder: Path, say: Say) -> None:
    """Download one file until it has the Hub's checksum, which the client itself does not look at.

    Raises:
        HubError: it is damaged every time.
    """
    path = folder / sibling.rfilename
    for number in range(TRIES):
        if path.is_file():
            if has_checksum(path, sibling):
                return
            say(f"{sibling.rfilename} is damaged; fetching it {'again' if number else 'anew'}")
        is_again = path.is_file()

        def download(is_again: bool = is_again) -> None:
            # The forced one also passes by the cache of this machine, which may be where the damage is.
            api.hf_hub_download(repo_id, sibling.rfilename, revision=commit, local_dir=folder, force_download=is_again)

        try:
            patiently(download, say, is_final=was_retried_by_the_client)
        except OSError as error:
            # Of another size than announced, huggingface_hub 2.4 raises a bare OSError.
            if type(error) is not OSError or error.errno is not None:
                raise
            say(f"{sibling.rfilename} came with another size than the Hub told")
    if not (path.is_file() and has_checksum(path, sibling)):
        raise HubError(f"{sibling.rfilename} of {repo_id} came damaged {TRIES} times. Nothing was changed.")


def settle(staged: Path, folder: Path, repo_id: str, commit: str, names: list[str]) -> None:
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


class PushByList:
    """Gives transformers' Trainer the push of this file: `class MyTrainer(PushByList, Trainer)`.

    Trainer itself sends its whole output folder with training_args.bin in it, a pickle that holds `hub_token` and paths
    of the machine, and gives up when a commit fails once. Its arguments `push_to_hub`, `hub_model_id`, `hub_token`,
    `hub_private_repo`, `hub_revision` and `hub_strategy` ("end" or "every_save") mean the same here. A push blocks.
    """

    args: Any
    hub_model_id: str | None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository.

        Raises:
            ValueError: `hub_strategy` would send optimizer states.
        """
        if self.args.hub_strategy not in ("end", "every_save"):
            raise ValueError(
                f"`hub_strategy` ({self.args.hub_strategy!s}) sends checkpoints with optimizer states, which never "
                'leave. Use "every_save" or "end".'
            )
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        is_private = self.args.hub_private_repo if private is None else private
        with one_line_errors(name):
            api = connect(token or self.args.hub_token)
            url = patiently(lambda: api.create_repo(name, private=is_private, exist_ok=True), lambda text: None)
        self.hub_model_id = url.repo_id
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Pushed | Future | None:
        """Save the model and push it; see Trainer's. Returns None on all processes but the first."""
        trainer: Any = self
        trainer.callback_handler.on_push_begin(self.args, trainer.state, trainer.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        trainer.save_model(_internal_call=True)
        if not trainer.is_world_process_zero():
            return None
        assert self.hub_model_id is not None
        card.setdefault("model_name", self.hub_model_id.rpartition("/")[2])
        trainer.create_model_card(**card)
        options = self.options(token, revision, commit_message)
        if not blocking:
            return HfApi().run_as_future(push, self.args.output_dir, self.hub_model_id, **options)
        return push(self.args.output_dir, self.hub_model_id, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        trainer: Any = self
        if not trainer.is_world_process_zero() or self.args.hub_strategy == "end":
            return
        trainer.callback_handler.on_push_begin(self.args, trainer.state, trainer.control)
        assert self.hub_model_id is not None
        message = f"Training in progress, step {trainer.state.global_step}"
        push(checkpoint_folder, self.hub_model_id, **self.options(None, None, message))

    def options(self, token: str | None, revision: str | None, message: str | None) -> dict[str, Any]:
        """What Trainer's arguments say about a push."""
        return {
            "token": token or self.args.hub_token,
            "revision": revision or self.args.hub_revision,
            "message": message or "End of training",
        }
