"""Commands that use a model: measure it, let it write."""

from typing import Annotated

import typer

from hfgpt.cli.app import Json, Model, app, print_json


@app.command()
def evaluate(
    model: Model,
    data: Annotated[list[str], typer.Option(help="File or folder of text; may be given more than once.")],
    text_column: Annotated[str, typer.Option(help="Column of the text in .jsonl, .csv and .parquet.")] = "text",
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in one forward pass.")] = 8,
    as_json: Json = False,
) -> None:
    """Measure loss and perplexity of a model on a text."""
    from hfgpt.evaluation import evaluate_files

    score = evaluate_files(model, data, text_column, batch_size)
    result = {"loss": score.loss, "perplexity": score.perplexity, "tokens": score.tokens}
    if as_json:
        print_json(result)
    else:
        print(f"loss        {score.loss:.4f} nats/token")
        print(f"perplexity  {score.perplexity:.2f}")
        print(f"tokens      {score.tokens:,} scored, in windows of the model's context")


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
