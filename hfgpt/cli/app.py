"""The app that the commands register with, and the arguments and options that several of them take."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from hfgpt.config.recipes import run_recipes
from hfgpt.config.values import expand_home
from hfgpt.system.console import reserve_stdout, result_stream

PARTS_OF_THE_JOB = {
    "Prepare": ("doctor", "recipes", "new", "config", "tokenizer", "data"),
    "Train": ("train", "lecture", "compare", "bench"),
    "Use": ("evaluate", "explore", "generate", "play"),
    "Convert": ("verify", "check", "convert", "adopt"),
    "Share": ("card", "update-code", "push", "pull"),
}
ORDER_OF_THE_JOB = tuple(name for names in PARTS_OF_THE_JOB.values() for name in names)


PATHS = ("model", "source", "what", "data", "tokenizer", "recipe", "resume", "runs")
"""Parameters that hold a path as text, if they hold one; a `Path` always does."""
MAY_BE_EMPTY = ("prompt", "text", "stop", "resume", "license", "language")
"""Parameters whose empty value means something, or is refused where it is read."""


class JobOrder(TyperGroup):
    """Lists the commands by the parts of the job; typer itself would go by where they are written."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Put the names in order."""
        return sorted(super().list_commands(ctx), key=ORDER_OF_THE_JOB.index)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Put a command under its part of the job in the help."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            command.rich_help_panel = next(  # type: ignore[attr-defined]
                part for part, names in PARTS_OF_THE_JOB.items() if cmd_name in names
            )
        return command


class Command(TyperCommand):
    """A command whose results are alone on stdout, and in whose paths `~` is the home folder.

    It takes no empty words but where a text may be empty.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse an empty word, which would be read as this folder, or as nothing given."""
        is_any_empty = "" in args or any(word.startswith("--") and word.endswith("=") for word in args)
        rest = super().parse_args(ctx, args)
        for parameter in self.params if is_any_empty else []:
            values = ctx.params.get(parameter.name)
            for value in values if isinstance(values, list) else [values]:
                if value in ("", Path()) and parameter.name not in MAY_BE_EMPTY:
                    is_option = parameter.param_type_name == "option"
                    name = parameter.opts[-1] if is_option else parameter.metavar or parameter.name
                    raise ValueError(f"`{name}` is empty. Give it a value, or leave it out.")
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Run it. Typer prints help and completion before this is called."""
        # A shell expands `~` at the beginning of a word, not in `--data=~/x`, and not for a program that starts this.
        ctx.params |= {
            name: expand_home(value) for name, value in ctx.params.items() if name in PATHS or isinstance(value, Path)
        }
        with reserve_stdout():
            return super().invoke(ctx)


class Commands(typer.Typer):
    """A group of such commands."""

    def command(self, *args: Any, **kwargs: Any) -> Any:
        """Register a function."""
        return super().command(*args, cls=Command, **kwargs)


app = Commands(
    name="hfgpt",
    cls=JobOrder,
    help="A GPT from scratch, in the Hugging Face ecosystem. The commands are in the order of the job.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def complete_recipe(incomplete: str) -> list[str]:
    """Offer the recipes that come with hfgpt, YAML files and folders."""
    folder, slash, begin = incomplete.rpartition("/")
    there = [path for path in sorted(Path(folder + slash).glob("*")) if path.name.startswith(begin)]
    files = [f"{folder}{slash}{path.name}" for path in there if path.suffix in (".yaml", ".yml")]
    folders = [f"{folder}{slash}{path.name}/" for path in there if path.is_dir() and not path.name.startswith(".")]
    return [*(name for name in run_recipes() if name.startswith(incomplete)), *files, *folders]


def complete_override(incomplete: str) -> list[str]:
    """Offer the keys of a recipe."""
    from hfgpt.config.keys import recipe_keys  # which `hfgpt --help` does not need

    return [f"{key}=" for key in recipe_keys() if key.startswith(incomplete)]


Allocator = Annotated[
    str, typer.Option(help="keep: freed memory is kept for what comes next, faster on CPUs; or default.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
Model = Annotated[str, typer.Argument(help="Folder or Hub id of an hfgpt or GPT-2 model.", metavar="MODEL")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that lies beside the weights.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Values that differ from the recipe's.", metavar="KEY.PATH=VALUE", autocompletion=complete_override
    ),
]
Recipe = Annotated[
    str,
    typer.Argument(
        help="A YAML file, or a name: `hfgpt recipes` lists them.", metavar="RECIPE", autocompletion=complete_recipe
    ),
]


def print_version(is_wanted: bool) -> None:
    """Print the version, and be done."""
    if is_wanted:
        from hfgpt import __version__

        print_result(f"hfgpt {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Read the options before the command."""


@contextmanager
def busy(doing: str, source: str | Path | None = None) -> Iterator[None]:
    """Show a spinner on a terminal while something of unknown length is done.

    Args:
        doing: what is done.
        source: the model that is read. If it comes from the Hub nothing is shown, because the download has bars.
    """
    console = Console(stderr=True)
    if not console.is_terminal or (source is not None and not Path(source).exists()):
        yield
        return
    with console.status(doing):
        yield


def print_result(text: object, end: str = "\n") -> None:
    """Print a result to stdout, where nothing else goes."""
    print(text, end=end, file=result_stream())


def print_json(result: dict[str, Any]) -> None:
    """Print one object on one line, as programs read it."""
    print_result(json.dumps(result, ensure_ascii=not writes_unicode()))


def writes_unicode() -> bool:
    """Whether stdout takes every letter as it is."""
    return (result_stream().encoding or "utf-8").lower().replace("-", "") == "utf8"
