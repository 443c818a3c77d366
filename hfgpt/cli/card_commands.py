"""The command about a run's card."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hfgpt.cli.app import app, busy, print_result
from hfgpt.system.console import print_status


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of a finished run; or a NAME.json of results.")],
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the card says anything else.")] = False,
    license: Annotated[str | None, typer.Option(help="Of the weights, as the Hub names it: mit, cc-by-4.0 ...")] = None,
    language: Annotated[str | None, typer.Option(help="Of the text: en, ko ...")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Name on the Hub, for the code that the card shows.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare with transformers' GPT-2, and say so.")] = False,
) -> None:
    """Write the model card, README.md, from what was measured."""
    given = {"license": license, "language": language, "repo_id": repo_id}
    words = {name: value for name, value in given.items() if value is not None}
    if check and (words or verify):
        raise ValueError("`--check` writes nothing: give it alone.")
    from hfgpt.results.card import compare_card, write_card

    if check:
        difference = compare_card(folder)
        if difference is not None:
            print_status(f"error: {difference} `hfgpt card {folder}` writes it anew.")
            raise typer.Exit(1)
        return
    verified = None
    if verify:
        from importlib.metadata import version

        from hfgpt.evaluation.verify_gpt2 import verify as compare_with_gpt2

        with busy(f"comparing {folder} with GPT-2"):
            verified = {**asdict(compare_with_gpt2(folder)), "transformers": version("transformers")}
    print_result(write_card(folder, words, verified))
