"""Commands around training: how fast is it here, and beside others."""

from pathlib import Path
from typing import Annotated

import typer

from hfgpt.cli.app import Json, app, print_json, print_result
from hfgpt.studio.job import COMMANDS, GROWTH, SIZES, make_growth, make_job
from hfgpt.system.allocator import ALLOCATORS
from hfgpt.system.console import print_status


@app.command()
def bench(
    command: Annotated[str, typer.Argument(help=f"What to measure: {', '.join(COMMANDS)}.", metavar="COMMAND")],
    against: Annotated[
        str, typer.Option(help="Peers, with commas between: transformers, nanogpt=PATH, ...", metavar="PEER,...")
    ] = "transformers",
    size: Annotated[str, typer.Option(help=f"Of the model: {', '.join(SIZES)}.")] = "small",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="a GPU, if there is one")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16.", show_default="fp32")] = None,
    compiles: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Run both sides through torch.compile.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a step.", show_default="by size")] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens of a row; of generate, of the prompt.", show_default="by size")
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Of generate.", show_default="64")] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Of generate: sample among so many.", show_default="the likeliest")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Of evaluate: score the last so many tokens of a row.", show_default="all")
    ] = None,
    megabytes: Annotated[float | None, typer.Option(help="Of text, of data.", show_default="2")] = None,
    processes: Annotated[int | None, typer.Option(help="Of data, on both sides.", show_default="1")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Of data: a folder or Hub id.", show_default="trained on the text")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Turns of each side.", show_default="5")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of a turn.", show_default="3")] = None,
    allocator: Annotated[
        str | None, typer.Option(help=f"Of our side: {', '.join(ALLOCATORS)}.", show_default="default")
    ] = None,
    grow: Annotated[
        str | None, typer.Option(help=f"Measure as work grows, by {', '.join(GROWTH)}.", show_default=False)
    ] = None,
    values: Annotated[str | None, typer.Option(help="What --grow tries, such as 128,256.", show_default=False)] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG of --grow.", show_default="bench-COMMAND-GROW.png")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Let the PNG replace another.")] = False,
    as_json: Json = False,
) -> None:
    """Measure hfgpt beside others on this machine, in turns, after a proof that both compute the same."""
    job = make_job(
        command,
        against,
        size=size,
        device=device,
        precision=precision,
        compile=compiles,
        batch_size=batch_size,
        block_size=block_size,
        new_tokens=new_tokens,
        top_k=top_k,
        stride=stride,
        megabytes=megabytes,
        processes=processes,
        tokenizer=tokenizer,
        rounds=rounds,
        steps=steps,
        allocator=allocator,
    )
    growth = make_growth(job, grow, values, picture, overwrite)

    from hfgpt.studio.bench import bench
    from hfgpt.studio.report import render

    if growth is None:
        report = bench(job)
        shown = render(report)
    else:
        from hfgpt.studio.growth import measure_growth, render_growth

        report = measure_growth(job, growth)
        shown = render_growth(report)
        print_status(f"wrote {growth.picture}")
    if as_json:
        print_json(report)
    else:
        print_result(shown)
    for warning in report["warnings"]:
        print_status(f"warning: {warning}")
