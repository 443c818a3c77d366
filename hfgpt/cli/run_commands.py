"""Commands about a run: its recipe, its tokenizer, its training."""

from contextlib import redirect_stdout
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from hfgpt.cli.app import Allocator, Commands, Json, Overrides, Recipe, app, print_json, print_result, writes_unicode
from hfgpt.config.ranges import check_choice
from hfgpt.config.recipes import bundled_recipes
from hfgpt.system.allocator import ALLOCATORS, use_allocator
from hfgpt.system.console import print_status, result_stream
from hfgpt.system.suggest import did_you_mean

LECTURE_STEPS = (
    *("text", "tokens", "gibberish", "loss", "perplexity", "windows", "before"),
    *("training", "temperature", "top_k", "resume", "gpt2"),
)
"""The keys of the lecture's `STEPS`, repeated because importing the lecture takes seconds."""


def complete_step(incomplete: str) -> list[str]:
    """Offer the steps of the lecture."""
    return [step for step in LECTURE_STEPS if step.startswith(incomplete)]


tokenizer_app = Commands(help="Train a tokenizer by itself.", no_args_is_help=True)
data_app = Commands(help="Prepare the text of a run by itself.", no_args_is_help=True)


@app.command()
def config(recipe: Recipe, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print a recipe with every value filled in, and where each comes from."""
    from hfgpt.config.loading import annotated_yaml, load_config, value_origins

    loaded = load_config(recipe, overrides or [])
    origins = value_origins(loaded, recipe, overrides or [])
    if as_json:
        print_json({"config": asdict(loaded), "origins": origins})
    else:
        print_result(annotated_yaml(loaded, origins, writes_unicode()), end="")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print the path of this one's file.", metavar="NAME")] = None,
    as_json: Json = False,
) -> None:
    """List the recipes that come with hfgpt, and what takes them."""
    found = {recipe.name: recipe for recipe in bundled_recipes()}
    if name is not None and name not in found:
        raise ValueError(
            f"no recipe {name!r} comes with hfgpt.{did_you_mean(name, found)} There are {', '.join(found)}."
        )
    if as_json:
        chosen = found if name is None else {name: found[name]}
        print_json({key: {**asdict(recipe), "path": str(recipe.path)} for key, recipe in chosen.items()})
    elif name is not None:
        print_result(found[name].path)
    else:
        width = max(map(len, found))
        for use, group in groupby(found.values(), key=lambda recipe: recipe.use):
            print_result(use)
            for recipe in group:
                print_result(f"  {recipe.name:<{width}}  {recipe.about}")


@app.command()
def lecture(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Steps ({', '.join(LECTURE_STEPS)}; none means all) and values that differ from the recipe's.",
            metavar="STEP | KEY=VALUE",
            autocompletion=complete_step,
        ),
    ] = None,
) -> None:
    """Run the lecture on pretraining a GPT, whole or step by step."""
    from hfgpt.config.recipes.lecture.__main__ import run

    with redirect_stdout(result_stream()):  # what the steps print is their result
        run([word for word in words or [] if "=" not in word], [word for word in words or [] if "=" in word])


@tokenizer_app.command("train")
def tokenizer_train(
    folder: Annotated[Path, typer.Argument(help="Folder to save the tokenizer in.", metavar="FOLDER")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Such as `data.files=my.txt tokenizer.vocab_size=8000`.", metavar="KEY.PATH=VALUE"),
    ] = None,
    recipe: Annotated[str, typer.Option(help="Recipe that names the text.")] = "demo",
) -> None:
    """Train a byte-level BPE tokenizer on the training split of a recipe's text."""
    from hfgpt.config.loading import load_config

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty. Name a new folder.")
    loaded = load_config(recipe, overrides or [])  # before the slow imports, so that a typo is answered at once
    from hfgpt.data.prepare import train_run_tokenizer
    from hfgpt.data.tokenizer import save_tokenizer

    tokenizer = train_run_tokenizer(loaded)
    save_tokenizer(tokenizer, folder)
    print_status(f"{len(tokenizer):,} token ids in {folder}")


app.add_typer(tokenizer_app, name="tokenizer")


@data_app.command("prepare")
def data_prepare(recipe: Recipe, overrides: Overrides = None, as_json: Json = False) -> None:
    """Tokenize the text of a recipe into the cache, where training finds it, and count it."""
    from hfgpt.config.loading import load_config

    loaded = load_config(recipe, overrides or [])  # before the slow imports, as above
    from hfgpt.data.prepare import prepare_text, render
    from hfgpt.data.vocabulary import MOST_UNKNOWN, describe_unknown

    prepared = prepare_text(loaded)
    share = max(prepared.train.unknown_share, prepared.validation.unknown_share)
    if share > MOST_UNKNOWN:
        print_status(f"warning: {describe_unknown(share)}")
    if as_json:
        print_json(asdict(prepared))
    else:
        print_result(render(prepared))


app.add_typer(data_app, name="data")


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[CHECKPOINT]",
            help="Go on from a checkpoint folder; without one from the newest, or from the start if there is none.",
        ),
    ] = None,
    allocator: Allocator = "keep",
    as_json: Json = False,
) -> None:
    """Train a model by a recipe, through the loop that it names."""
    from hfgpt.config.loading import load_config

    check_choice("--allocator", allocator, ALLOCATORS)
    loaded = load_config(recipe, overrides or [])  # before the slow imports, so that a typo is answered at once
    use_allocator(allocator)
    from accelerate import PartialState

    from hfgpt.distributed.launch import leave_processes
    from hfgpt.training.signals import RESUMABLE, Stopped
    from hfgpt.training.train import train

    try:
        results = train(loaded, resume=resume or resume is not None)
    except Stopped as error:
        print_status(str(error))
        leave_processes()
        raise typer.Exit(RESUMABLE) from None
    leave_processes()
    if results.was_finished:
        print_status(f"{loaded.output_dir} holds this run, finished.")
    if not PartialState().is_main_process:
        return
    if as_json:
        print_json(results)
    else:
        line = f"{loaded.output_dir}: validation perplexity {results['val_perplexity']:.1f}"
        if "bigram_perplexity" in results:
            line += f"; of the same tokens, a bigram model's is {results['bigram_perplexity']:.1f}"
            line += f", a unigram model's {results['unigram_perplexity']:.1f}"
        print_status(line)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Look at this machine: versions, devices, memory, what is missing, and known traps."""
    from hfgpt.system.doctor import examine, render

    report = examine(Path.cwd())
    if as_json:
        print_json(report)
    else:
        print_result(render(report))
    if any(finding["is_fault"] for finding in report["findings"]):
        raise typer.Exit(1)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of two or more runs, finished or not.", metavar="RUN")],
    picture: Annotated[Path, typer.Option(help="PNG file to draw the curves in.")] = Path("compare.png"),
    as_json: Json = False,
) -> None:
    """Put runs side by side: a table, their curves as a picture, and the options in which they differ."""
    from hfgpt.results.compare import compare_runs, render

    comparison = compare_runs(runs, picture)
    for warning in comparison["warnings"]:
        print_status(f"warning: {warning}")
    if as_json:
        print_json(comparison)
    else:
        print_result(render(comparison))
    print_status(f"the curves are in {picture}")
