"""Commands that use a model: measure it, let it write."""

from pathlib import Path
from typing import Annotated

import typer

from hfgpt.cli.app import Json, Model, app, print_json, print_result


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
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in one forward pass.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of the weights: fp32, bf16, fp16, or auto: the file's.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1.", show_default="the first accelerator")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or Hub id.", show_default="the model's")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, with commas between: names, YAML files, folders of them.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.", show_default="all")] = None,
    as_json: Json = False,
) -> None:
    """Measure a model on texts (loss, perplexities, bits per byte) and on tasks of lm-eval."""
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
        tasks=[task.strip() for task in tasks.split(",")] if tasks else [],
        limit=limit,
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


Compare = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE,...", help="Settings to see beside others, such as `temperature=0.5,top_k=40`."),
]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="Text to write on from.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts: one a line, or .jsonl with objects that have a `prompt`.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Texts per prompt; with beam search the best ones.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts written together.")] = 8,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to write. Without it 100.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the logits; 0 takes the likeliest token. Without it 0.8.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Likeliest tokens to draw from; 0 draws from all. Without it 50.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Probability of the likeliest tokens to draw from.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens at least so many times as likely as the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: makes tokens that came before less likely.")
    ] = None,
    no_repeat_ngram_size: Annotated[int | None, typer.Option(help="No sequence of so many tokens comes twice.")] = None,
    num_beams: Annotated[int | None, typer.Option(help="Above 1: beam search, which samples nothing.")] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="Of beam search: below 1 favours short texts, above long ones.")
    ] = None,
    early_stopping: Annotated[
        str | None, typer.Option(metavar="true|false|never", help="When beam search stops looking for better.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Ends the text before it; `\\n` is a line break; repeatable."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes the texts; sample n has the seed SEED + n.")] = None,
    compare: Compare = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a text to stdout.")] = False,
) -> None:
    """Write on from a prompt, token by token, or from many at once."""
    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("give a PROMPT or `--prompts FILE`, one of them.")
    from hfgpt.generation.params import make_settings, make_variants, parse_value

    # The options have no defaults, so that only what was given is told to have no effect; `Settings` has them.
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "num_beams": num_beams,
        "length_penalty": length_penalty,
        "early_stopping": None if early_stopping is None else parse_value("early_stopping", early_stopping),
        "stop": tuple(text for each in stop for text in parse_value("stop", each)) if stop else None,
        "seed": seed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    variants = make_variants(given, compare) if compare else {"": make_settings(given)}

    from hfgpt.generation.generator import continue_text, generate_texts, load_generator, read_prompts
    from hfgpt.generation.render import open_console, print_comparison, print_texts, stream_to

    records = read_prompts(prompts) if prompts is not None else [{"prompt": prompt}]
    asked = [str(record["prompt"]) for record in records]
    writer, console = load_generator(model), open_console()
    if len(asked) == samples == len(variants) == 1 and not as_json:
        stream_to(console, asked[0], continue_text(writer, asked[0], next(iter(variants.values()))))
        return
    texts = {
        label: generate_texts(writer, asked, settings, samples=samples, batch_size=batch_size)
        for label, settings in variants.items()
    }
    for number, record in enumerate(records, start=1):
        written = {label: next(each) for label, each in texts.items()}
        if as_json:
            for label, text in ((label, text) for label, each in written.items() for text in each):
                print_json({**record, **({"settings": label} if compare else {}), **text.record()})
        elif compare:
            print_comparison(console, asked[number - 1], written)
        else:
            print_texts(console, asked[number - 1], written[""], number, len(records))


@app.command()
def explore(
    model: Model,
    text: Annotated[str, typer.Argument(help="Text to look at, and to look on from.")],
    compare: Compare = None,
    top: Annotated[int, typer.Option(min=1, help="Tokens to show of those that may come next.")] = 10,
    steps: Annotated[int, typer.Option(min=0, help="Tokens of the likeliest way on.")] = 8,
    alternatives: Annotated[int, typer.Option(min=0, help="Other tokens to show at each step.")] = 3,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the distributions of the next token.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write all of it as one page.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Let the files replace others.")] = False,
    as_json: Json = False,
) -> None:
    """Look at what a model expects: of each token of a text, after it, and along the likeliest way on."""
    from hfgpt.generation.params import EXPLORED, explored_variants
    from hfgpt.system.storage import check_new_file, write_atomically

    variants = explored_variants(compare or EXPLORED)
    for path, ending in ((plot, ".png"), (html, ".html")):
        if path is not None:
            check_new_file(path, ending, overwrite)

    from hfgpt.generation.explore import explore
    from hfgpt.generation.generator import load_generator
    from hfgpt.generation.render import open_console, print_exploration
    from hfgpt.system.console import print_status

    found = explore(load_generator(model), text, variants, top=top, steps=steps, alternatives=alternatives)
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
) -> None:
    """Type prompts and see them written on, until Ctrl-D."""
    from hfgpt.generation.params import make_settings, parse_settings

    given = parse_settings(settings) if settings else {}
    make_settings(given)
    from hfgpt.generation.generator import load_generator
    from hfgpt.generation.play import play

    play(load_generator(model), given)
