"""Commands that use a model: measure it, generate text, explore what it predicts."""

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hfgpt.cli.app import Allocator, Json, Model, TrustRemoteCode, app, print_json, print_result
from hfgpt.config.ranges import check_choice
from hfgpt.generation.params import (
    DEFAULTS,
    EXPLORED,
    NUMBER_TYPES,
    OPTIONS,
    change_params,
    explored_variants,
    format_value,
    make_variants,
    parse_params,
    parse_value,
)
from hfgpt.system.allocator import ALLOCATORS, use_allocator


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of any causal language model.", metavar="MODEL")],
    data: Annotated[list[str] | None, typer.Option(help="File or folder of text; may be given more than once.")] = None,
    text_column: Annotated[str, typer.Option(help="Column of the text in .jsonl, .csv and .parquet.")] = "text",
    stride: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens that a window adds, 1 to the context; may be given more than once.",
            show_default="half the context",
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Longest window, in tokens.", show_default="the model's")
    ] = None,
    first_token: Annotated[
        str, typer.Option(help="lm-eval: as it does; text: without what the tokenizer adds; skip: do not score it.")
    ] = "lm-eval",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Windows in one forward pass.", show_default="8; on a CPU, of 1,024 tokens"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: fp32, bf16, fp16, or auto: the file's.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1.", show_default="the first accelerator")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or Hub id.", show_default="the model's")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, with commas between: names, YAML files, folders of them.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.", show_default="all")] = None,
    allocator: Allocator = "keep",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure a model on texts (loss, perplexities, bits per byte) and on tasks of lm-eval."""
    check_choice("--allocator", allocator, ALLOCATORS)
    use_allocator(allocator)
    from accelerate import PartialState

    from hfgpt.distributed.launch import leave_processes
    from hfgpt.evaluation.report import measure, render, save_tasks, to_json
    from hfgpt.system.console import print_status

    report = measure(
        model,
        data or [],
        text_column=text_column,
        tokenizer_name=tokenizer,
        strides=stride,
        context=context,
        first_token=first_token,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        tasks=[os.path.expanduser(task.strip()) for task in tasks.split(",")] if tasks else [],
        limit=limit,
        trust_remote_code=trust_remote_code,
    )
    leave_processes()
    if not PartialState().is_main_process:
        return
    if as_json:
        print_json(to_json(report))
    else:
        print_result(render(report))
    if saved_in := save_tasks(model, report.tasks):
        print_status(f"the tasks' figures are in {saved_in}, too")


def with_sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per field of `SamplingParams`, in place of its parameter `given`.

    The options' own default is None, so that `given` holds what was given, and only that is said to have no effect.
    """

    @functools.wraps(command)
    def run(**values: Any) -> None:
        options = {name: values.pop(name) for name in OPTIONS}
        given = {name: read_option(name, value) for name, value in options.items() if value not in (None, [])}
        command(given=given, **values)

    signature = inspect.signature(command)
    parameters = []
    for parameter in signature.parameters.values():
        parameters += sampling_parameters() if parameter.name == "given" else [parameter]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def sampling_parameters() -> list[inspect.Parameter]:
    """A parameter of a command for each field of `SamplingParams`; numbers are read by typer, the rest as text."""
    parameters = []
    for name, field in OPTIONS.items():
        kind = NUMBER_TYPES.get(field.type, list[str] if name == "stop" else str)
        default = False if field.default in (None, ()) else format_value(name, field.default)[0]
        option = typer.Option(help=field.metadata["help"], metavar=field.metadata["metavar"], show_default=default)
        annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return parameters


def read_option(name: str, value: Any) -> Any:
    """The value of a field from what typer read."""
    if name == "stop":
        return tuple(text for each in value for text in parse_value(name, each))
    return parse_value(name, value) if isinstance(value, str) else value


Compare = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE,...", help="Settings to see beside others, such as `temperature=0.5,top_k=40`."),
]


@app.command()
@with_sampling_options
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="Text to continue.", metavar="PROMPT")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts: one a line, or .jsonl with objects that have a `prompt`.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Texts per prompt; with beam search the best ones.")
    ] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts generated together.")] = 8,
    *,
    given: dict[str, Any],
    compare: Compare = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a text to stdout.")] = False,
) -> None:
    """Continue a prompt, token by token, or many at once."""
    if (prompt is None) == (prompts is None):
        found = "neither" if prompt is None else f"both, and the file is {str(prompts)!r}"
        raise ValueError(f"give a PROMPT, the text to continue, or `--prompts FILE`, one of them: got {found}.")
    variants = make_variants(given, compare) if compare else {"": change_params(DEFAULTS, given)}

    from hfgpt.generation.generator import continue_text, generate_texts, load_generator, read_prompts
    from hfgpt.generation.render import open_console, print_comparison, print_texts, stream_to

    records = read_prompts(prompts) if prompts is not None else [{"prompt": prompt}]
    asked = [str(record["prompt"]) for record in records]
    generator, console = load_generator(model, trust_remote_code), open_console()
    if len(asked) == samples == len(variants) == 1 and not as_json:
        (params,) = variants.values()
        stream_to(console, asked[0], continue_text(generator, asked[0], params))
        return
    streams = {
        label: generate_texts(generator, asked, params, samples=samples, batch_size=batch_size)
        for label, params in variants.items()
    }
    for number, record in enumerate(records, start=1):
        texts = {label: next(each) for label, each in streams.items()}
        if as_json:
            for label, text in ((label, text) for label, each in texts.items() for text in each):
                print_json({**record, **({"settings": label} if compare else {}), **text.record()})
        elif compare:
            print_comparison(console, asked[number - 1], texts)
        else:
            print_texts(console, asked[number - 1], texts[""], number, len(records))


@app.command()
def explore(
    model: Model,
    text: Annotated[str, typer.Argument(help="Text to look at, and to continue.", metavar="TEXT")],
    compare: Compare = None,
    top: Annotated[int, typer.Option(min=1, help="Tokens to show of those that may come next.")] = 10,
    steps: Annotated[int, typer.Option(min=0, help="Tokens of the most likely continuation.")] = 8,
    alternatives: Annotated[int, typer.Option(min=0, help="Other tokens to show at each step.")] = 3,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the distributions of the next token.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write all of it as one page.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Let the files replace others.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Look at what a model predicts: each token of a text, the next one, and the most likely continuation."""
    from hfgpt.system.storage import check_new_file, write_atomically

    variants = explored_variants(compare or EXPLORED)
    for path, ending in ((plot, ".png"), (html, ".html")):
        if path is not None:
            check_new_file(path, ending, overwrite)

    from hfgpt.generation.explore import explore
    from hfgpt.generation.generator import load_generator
    from hfgpt.generation.render import open_console, print_exploration
    from hfgpt.system.console import print_status

    found = explore(
        load_generator(model, trust_remote_code), text, variants, top=top, steps=steps, alternatives=alternatives
    )
    if as_json:
        print_json(found.record())
    else:
        print_exploration(open_console(), found)
    for path, ending in ((plot, ".png"), (html, ".html")):
        if path is not None:
            from hfgpt.generation.explore_plots import draw_distributions, render_page

            write_atomically(path, (draw_distributions if ending == ".png" else render_page)(found))
            print_status(f"wrote {path}")


@app.command()
def play(
    model: Model,
    settings: Annotated[
        str | None,
        typer.Option("--set", metavar="NAME=VALUE,...", help="Settings, such as `temperature=0.5,top_k=40`."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Type prompts and read their continuations, until Ctrl-D."""
    params = change_params(DEFAULTS, parse_params(settings) if settings else {})

    from hfgpt.generation.generator import load_generator
    from hfgpt.generation.play import play

    play(load_generator(model, trust_remote_code), params)
