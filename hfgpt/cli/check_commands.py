"""The command that checks a causal language model."""

from pathlib import Path
from typing import Annotated

import typer

from hfgpt.cli.app import Json, TrustRemoteCode, app, busy, print_json


@app.command()
def check(
    what: Annotated[
        str,
        typer.Argument(metavar="WHAT", help="Folder of a model, `package.module:Class`, or Hub id of a config."),
    ],
    only: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Promises or groups of them.", show_default="all")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Write the report for a pull request, too.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Let the file replace another.")] = False,
    as_json: Json = False,
) -> None:
    """Try what users of transformers rely on, with any causal language model; exit code 1 if a promise is broken."""
    from hfgpt.system.storage import check_new_file, write_atomically

    if markdown is not None:
        check_new_file(markdown, ".md", overwrite)
    names = [] if only is None else [name for name in only.replace(",", " ").split() if name]

    from hfgpt.check import check
    from hfgpt.check.report import print_report, to_markdown

    with busy(f"checking {what}", what):
        report = check(what, only=names, trust_remote_code=trust_remote_code)
    if markdown is not None:
        write_atomically(markdown, to_markdown(report).encode())
    if as_json:
        print_json(report.to_json())
    else:
        print_report(report)
    if not report.is_passed:
        raise typer.Exit(1)
