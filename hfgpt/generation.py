"""Text from a saved model: the model and its tokenizer are loaded, and decoding.py writes."""

from collections.abc import Iterator

import torch

from hfgpt.decoding import stream, stream_text
from hfgpt.tokenizer import encode_ids, load_tokenizer, require_end_of_text
from hfgpt.weights import load


def continue_text(
    source: str,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """Load a model and write on from a prompt.

    Args:
        source: folder or Hub id of a model with its tokenizer.
        prompt: may be empty: then a document is begun.
        max_new_tokens: at least 1; prompt and new tokens together must fit the model's positions.
        temperature: see `hfgpt.decoding.stream`, as for the rest.
        top_k: see there.
        top_p: see there.
        seed: fixes the text; None writes another one each time.

    Returns:
        Pieces of the new text, each as soon as it consists of whole characters. An end-of-text token ends it.

    Raises:
        ValueError: there is no such model or tokenizer, or the settings do not fit.
    """
    model, tokenizer = load(source), load_tokenizer(source)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    model.to(device)
    (ids,) = encode_ids(tokenizer, [prompt])
    if not ids:
        require_end_of_text(tokenizer, source)
        ids = [tokenizer.eos_token_id]
    if max(ids) >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {source} makes the id {max(ids)}, the model's `vocab_size` is "
            f"{model.config.vocab_size}. They do not belong together."
        )
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    steps = stream(
        model,
        torch.tensor([ids], device=device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_token_id=tokenizer.eos_token_id,
        generator=generator,
    )
    return stream_text(tokenizer, (ids_B[0] for ids_B in steps))
