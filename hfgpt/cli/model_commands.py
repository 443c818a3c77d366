"""Commands that use a model: measure it, let it write."""

from typing import Annotated

import typer

from hfgpt.cli.app import Json, Model, app, print_json


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

    from hfgpt.measure import measure, render, save_tasks, to_json
    from hfgpt.recorder import talk

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
    if not PartialState().is_main_process:
        return
    if as_json:
        print_json(to_json(report))
    else:
        print(render(report))
    if saved_in := save_tasks(model, report.tasks):
        talk(f"the tasks' figures are in {saved_in}, too")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to write on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 100,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Likeliest tokens to draw from; 0 draws from all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Probability of the likeliest tokens to draw from.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Fixes the text.")] = None,
    as_json: Json = False,
) -> None:
    """Write on from a prompt, token by token."""
    from hfgpt.generation import continue_text

    pieces = continue_text(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    if as_json:
        print_json({"prompt": prompt, "text": prompt + "".join(pieces)})
        return
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
