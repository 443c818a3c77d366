"""The command line's frame: the app that the commands register with, and the words that several of them take."""

import json
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

ORDER_OF_THE_JOB = (
    *("doctor", "config", "tokenizer", "data", "train", "compare"),
    *("evaluate", "explore", "generate", "play"),
    *("verify", "convert"),
    *("card", "push", "pull"),
)


class JobOrder(TyperGroup):
    """Lists the commands in the order of the job; typer itself puts those with subcommands last."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Put the names in order."""
        return sorted(super().list_commands(ctx), key=ORDER_OF_THE_JOB.index)


app = typer.Typer(
    name="hfgpt",
    cls=JobOrder,
    help="A GPT from scratch, in the Hugging Face ecosystem. The commands are in the order of the job.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
Model = Annotated[str, typer.Argument(help="Folder or Hub id of an hfgpt or GPT-2 model.", metavar="MODEL")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values that differ from the recipe's.", metavar="[KEY.PATH=VALUE]...")
]
Recipe = Annotated[str, typer.Argument(help="A YAML file, or `demo`.", metavar="RECIPE")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Read what stands before the command."""


def print_json(result: dict[str, Any]) -> None:
    """Print one object on one line, as programs read it."""
    print(json.dumps(result, ensure_ascii=False))
