"""Perplexity as a metric of the `evaluate` library: `evaluate.load(hfgpt.evaluation.METRIC)`. Works offline.

`evaluate` copies this file and imports the copy, so it imports hfgpt by its full name.
"""

from dataclasses import asdict
from typing import Any

import datasets
import evaluate
import numpy as np

from hfgpt.evaluation.loss import Score
from hfgpt.evaluation.perplexity import encode_texts, measure_texts, summarize

DESCRIPTION = """
Perplexity of a causal language model: e to the mean loss of all tokens, never a mean of perplexities of texts.
"""

INPUTS = """
Args:
    predictions: token losses in nats, one number each; or texts.
    model (with texts): folder or Hub id of any causal language model, or the model itself.
    tokenizer (with texts): of the model; needed where the model itself is given.
    context, stride, first_token, batch_size (with texts): see `hfgpt evaluate --help`; stride and context are by
        default the model's context.
    words, bytes (with losses): of the same text, for word perplexity and bits per byte.

Returns:
    perplexity: of tokens; loss: nats per token, with its standard error; word_perplexity, byte_perplexity and
    bits_per_byte where they can be known; convention: what was conditioned on what.

Examples:
    >>> import evaluate
    >>> from hfgpt.evaluation import METRIC
    >>> metric = evaluate.load(METRIC)
    >>> metric.add_batch(predictions=[0.0, 2.0])
    >>> round(metric.compute()["perplexity"], 3)
    2.718
"""


class CausalPerplexity(evaluate.Metric):
    """Token losses, or texts and a model, to perplexity."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            # Texts first: a text such as "2.5" is a number to a column of numbers.
            features=[
                datasets.Features({"predictions": datasets.Value("string")}),
                datasets.Features({"predictions": datasets.Value("float64")}),
            ],
        )

    def _compute(self, predictions: list[Any], model: Any = None, **options: Any) -> dict[str, Any]:
        """See `INPUTS`.

        Raises:
            ValueError: texts without a model, or a model with losses.
            FloatingPointError: a loss is no number.
        """
        if isinstance(predictions[0], str):
            if model is None:
                raise ValueError("texts need a model: `compute(model=...)`.")
            return of_texts(predictions, model, **options)
        if model is not None:
            raise ValueError("`model` has no effect: what was added are losses.")
        return of_losses(predictions, **options)


def of_losses(losses: list[float], words: int | None = None, bytes: int | None = None) -> dict[str, Any]:
    """Perplexity of tokens whose losses are known."""
    array = np.asarray(losses, dtype=np.float64)
    if not np.isfinite(array).all():
        raise FloatingPointError(f"{int((~np.isfinite(array)).sum())} of {len(array)} losses are no numbers.")
    score = Score(len(array), float(array.sum()), float(np.square(array).sum()))
    return named(asdict(summarize(score, words, bytes)), "e to the mean of the losses that were added")


def of_texts(
    texts: list[str],
    model: Any,
    tokenizer: Any = None,
    context: int | None = None,
    stride: int | None = None,
    first_token: str = "lm-eval",
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Perplexity of texts under a model."""
    from hfgpt.evaluation.load_model import choose_context, load_causal_lm

    if isinstance(model, str):
        model, tokenizer = load_causal_lm(model, tokenizer)
    elif tokenizer is None:
        raise ValueError("a model that is no name needs a tokenizer: `compute(model=..., tokenizer=...)`.")
    encoded = encode_texts(tokenizer, texts, first_token, model.get_input_embeddings().weight.shape[0])
    length = choose_context(model, context)
    measured = asdict(measure_texts(model, encoded, length, stride or length, batch_size))
    convention = f"windows of {length} tokens, stride {measured['stride']}; {encoded.convention}"
    return named(measured, convention)


def named(result: dict[str, Any], convention: str) -> dict[str, Any]:
    """Call the token perplexity what a metric of this name gives, and say what it means."""
    return {"perplexity": result.pop("token_perplexity"), **result, "convention": convention}
