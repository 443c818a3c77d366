"""Commands about the Hub: there and back."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hfgpt.cli.app import Json, app, print_json, print_result
from hfgpt.system.console import print_status

Repository = Annotated[str, typer.Argument(help="Name on the Hub, `user/model`.", metavar="USER/MODEL")]


@app.command()
def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a finished run, or of any hfgpt or GPT-2 model.", metavar="FOLDER")
    ],
    repo_id: Repository,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Visibility of a new repository; default: the owner's.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made if there is none; default: main.")] = None,
    create_pr: Annotated[bool, typer.Option("--pr", "--create-pr", help="Open a pull request.")] = False,
    tag: Annotated[str | None, typer.Option(help="Name to give the commit, such as v1.0.")] = None,
    message: Annotated[str, typer.Option("--commit-message", "-m", help="Title of the commit.")] = "Upload model",
    own_code: Annotated[bool, typer.Option("--own-code", help="Send code that differs from this hfgpt's.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would go and what stays; send nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Send a model to the Hub, in one commit; what may go stands on a list."""
    from hfgpt.hub.allowlist import plan_push
    from hfgpt.hub.push import push

    if dry_run:
        plan = plan_push(folder, own_code=own_code)
        files = {name: plan.size(name) for name in plan.files}
        skipped = {name: {"size": plan.size(name), "reason": reason} for name, reason in plan.skipped.items()}
        if as_json:
            print_json({"repo_id": repo_id, "files": files, "skipped": skipped, "notes": plan.notes})
            return
        print_result(f"would go to {repo_id}: {len(files)} files, {as_size(sum(files.values()))}")
        width = max(map(len, [*files, *skipped]))
        for name, size in files.items():
            print_result(f"  {name:<{width}}  {as_size(size):>9}")
        print_result("stays here:")
        for name, reason in plan.skipped.items():
            print_result(f"  {name:<{width}}  {as_size(plan.size(name)):>9}  {reason}")
        for note in plan.notes:
            print_status(note)
        return
    pushed = push(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        tag=tag,
        message=message,
        own_code=own_code,
        log=print_status,
    )
    if as_json:
        print_json(asdict(pushed))
    else:
        print_status("pushed" if pushed.is_new else "the Hub holds these files already; nothing was sent")
        print_result(pushed.url)


@app.command()
def update_code(
    folder: Annotated[
        Path, typer.Argument(help="Folder of any hfgpt model: a run's, a checkpoint, a pulled one.", metavar="FOLDER")
    ],
) -> None:
    """Replace the code beside the weights by this hfgpt's; the old is kept, the weights stay as they are."""
    from hfgpt import __version__
    from hfgpt.hub.pull import PULL_FILE
    from hfgpt.weights.remote_code import update_code

    updated = update_code(folder)
    if not updated.replaced:
        print_result(f"{folder}: its code is that of hfgpt {__version__}; nothing was changed")
        return
    kept = "" if updated.kept_in is None else f"; what was there is in {updated.kept_in}"
    print_result(f"{folder}: {', '.join(updated.replaced)} now of hfgpt {__version__}{kept}")
    if (folder / PULL_FILE).is_file():
        print_status(
            "it is no longer as it was pulled: `hfgpt push` brings the code to the Hub, and pull will not replace it"
        )


@app.command()
def pull(
    repo_id: Repository,
    folder: Annotated[
        Path, typer.Argument(help="New or empty folder, or one that was pulled from there.", metavar="FOLDER")
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: main.")] = None,
    as_json: Json = False,
) -> None:
    """Fetch a model from the Hub, and check every file against the Hub's checksum."""
    from hfgpt.hub.pull import pull

    pulled = pull(repo_id, folder, revision=revision, log=print_status)
    if as_json:
        print_json(asdict(pulled))
    else:
        state = "" if pulled.is_new else "; they were there already"
        print_status(f"{pulled.files} files of {pulled.commit[:8]}, every checksum right{state}")
        print_result(folder)


def as_size(size: int) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000  # type: ignore[assignment]
    return f"{size:.1f} GB"
