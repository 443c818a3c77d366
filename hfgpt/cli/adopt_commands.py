"""Somebody's own GPT, made a model of transformers."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hfgpt.cli.app import Json, app, busy, print_json, print_result


@app.command()
def adopt(
    what: Annotated[
        str, typer.Argument(help="The file and the class in it; its code is run.", metavar="FILE.py:CLASS")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON: what the class is made of.", show_default="what lies in the checkpoint"),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Weights: .pt, .pth, .ckpt or .safetensors; only read.", show_default="drawn at random"),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or Hub id, to go along.", show_default="none")] = None,
    name: Annotated[str | None, typer.Option(help="Of the model's classes.", show_default="that of --out")] = None,
    checks: Annotated[bool, typer.Option("--check/--no-check", help="End with `hfgpt check`'s report.")] = True,
    as_json: Json = False,
) -> None:
    """Make a folder that AutoModel loads of any class that turns token ids into logits.

    The exit code is 0 once the folder is there, whatever `hfgpt check` says of it: what the class does not keep was so
    before. `hfgpt check` on the folder ends with 1 if a promise is broken.
    """
    from hfgpt.adopt.adopt import adopt, render
    from hfgpt.system.console import print_status

    with busy(f"adopting {what}"):
        result = adopt(what, out, config=config, checkpoint=checkpoint, tokenizer=tokenizer, name=name)
    if not as_json:
        print_result(render(result))
    report = None
    if checks:
        from hfgpt.check import check
        from hfgpt.check.report import print_report

        with busy(f"checking {out}"):
            report = check(str(out), trust_remote_code=True)
        if not as_json:
            print_report(report)
            if not report.is_passed:
                print_status(
                    f"{out} is written. To try again what is broken: hfgpt check {out} --trust-remote-code --only "
                    f"{','.join(report.failed())}"
                )
    if as_json:
        print_json({**asdict(result), "check": None if report is None else report.to_json()})
