"""A project of one's own."""

from typing import Annotated

import typer

from hfgpt.cli.app import Json, app, print_json, print_result


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Of the project's folder and package, such as my_gpt.", metavar="NAME")],
    as_json: Json = False,
) -> None:
    """Write a project with a GPT of your own to change: model, recipe, tests, table of weights, README."""
    from hfgpt.adopt.new import new_project  # imports torch

    folder = new_project(name)
    if as_json:
        print_json({"folder": str(folder)})
    else:
        print_result(f"{folder}: `cd {folder}`, `make test`; README.md leads from there to a model on the Hub")
