"""To the Hub: a model folder sent in one commit, tried again where huggingface_hub gives up at the first hiccup."""

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id

from hfgpt.hub.allowlist import WEIGHTS, Plan, plan_push
from hfgpt.hub.repository import connect, has_checksum, repo_info
from hfgpt.hub.retry import HubError, Log, one_line_errors, was_retried_by_the_client, with_retries


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
    log: Log = lambda text: None,
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
        log: called with each message for a person.

    Raises:
        ValueError: the folder must not go, see `plan_push`; the repository is not as private as was asked for; the tag
            is taken; there is no token, or it may not write there.
        HubError: the Hub cannot be reached, fails again and again, or has a newer commit than when the push began.
    """
    check_target(repo_id, revision, create_pr, tag)
    plan = plan_push(folder, token, own_code)
    for note in plan.notes:
        log(note)
    with one_line_errors(repo_id):
        if (token or get_token()) is None:
            raise ValueError("there is no token for the Hub. Run `hf auth login`, or set HF_TOKEN.")
        target = Target(repo_id, revision, create_pr, connect(token), log)
        target.make(private)
        head = target.repo_info(revision)
        if tag is not None:
            target.check_tag(tag, plan)
        if holds(head, plan):
            commit, is_new, pull_request = str(head.sha), False, None
        else:
            commit, pull_request = target.commit(plan, head, message)
            is_new = True
        if tag is not None:
            with_retries(lambda: target.api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True), log)
    return Pushed(repo_id, commit, f"{target.api.endpoint}/{repo_id}/commit/{commit}", is_new, pull_request)


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


@dataclass(frozen=True)
class Target:
    """Where a push goes."""

    repo_id: str
    revision: str | None
    create_pr: bool
    api: HfApi
    log: Log

    def repo_info(self, revision: str | None) -> ModelInfo:
        """The repository as it is now, with every file's checksum."""
        return repo_info(self.api, self.repo_id, revision, self.log)

    def make(self, private: bool | None) -> None:
        """Make the repository and the branch where there are none.

        Raises:
            ValueError: the repository is there, and not as private as it should be.
        """
        with_retries(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True), self.log)
        is_private = self.repo_info(None).private
        if private is not None and private != is_private:
            raise ValueError(
                f"{self.repo_id} exists and is {'private' if is_private else 'public'}. Change that in its settings on "
                f"the Hub, or leave out `--{'private' if private else 'public'}`."
            )
        branch = self.revision
        if branch not in (None, "main") and not str(branch).startswith("refs/"):
            with_retries(lambda: self.api.create_branch(self.repo_id, branch=str(branch), exist_ok=True), self.log)

    def refs(self) -> dict[str, str]:
        """Ref -> commit, of branches, tags and pull requests."""
        found = with_retries(lambda: self.api.list_repo_refs(self.repo_id, include_pull_requests=True), self.log)
        return {ref.ref: ref.target_commit for ref in [*found.branches, *found.tags, *(found.pull_requests or [])]}

    def check_tag(self, tag: str, plan: Plan) -> None:
        """Refuse a tag that names other files already.

        Raises:
            ValueError: it does.
        """
        commit = self.refs().get(f"refs/tags/{tag}")
        if commit is not None and not holds(self.repo_info(commit), plan):
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
            operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=at) for name, at in plan.files.items()]
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
            self.log(f"{name} of an earlier model is removed")
        try:
            commit, pull_request = with_retries(attempt, self.log, is_final=was_retried_by_the_client)
        except HfHubHTTPError as error:
            if error.response.status_code != 412:
                raise
            landed = self.landed(plan, pulls_before)
            if landed is None:
                newer = self.repo_info(self.revision).sha
                raise HubError(
                    f"{self.repo_id} has a newer commit, {str(newer)[:8]}, than when this push began, "
                    f"{str(head.sha)[:8]}. Nothing was overwritten. Look at it, then push again."
                ) from error
            commit, pull_request = landed
        if not holds(self.repo_info(commit), plan):
            raise HubError(f"{self.repo_id} does not hold what was sent, at {commit[:8]}. Push again.")
        return commit, pull_request

    def landed(self, plan: Plan, pulls_before: set[str]) -> tuple[str, str | None] | None:
        """The commit, and the pull request, that hold the files by now; None if there is none."""
        if not self.create_pr:
            head = self.repo_info(self.revision)
            return (str(head.sha), None) if holds(head, plan) else None
        for ref, commit in self.refs().items():
            if ref.startswith("refs/pr/") and ref not in pulls_before and holds(self.repo_info(ref), plan):
                return commit, ref
        return None


def holds(info: ModelInfo, plan: Plan) -> bool:
    """Whether a repository has all that goes, to the last bit, and no weights besides."""
    there = {sibling.rfilename: sibling for sibling in info.siblings or []}
    is_there = all(name in there and has_checksum(source, there[name]) for name, source in plan.files.items())
    return is_there and not outdated_weights(info, plan)


def outdated_weights(info: ModelInfo, plan: Plan) -> list[str]:
    """Weights in a repository that this model does not have: transformers would load an old whole before new shards."""
    names = [sibling.rfilename for sibling in info.siblings or []]
    return [name for name in names if name not in plan.files and any(fnmatch(name, pattern) for pattern in WEIGHTS)]
