"""Text from a saved model: one text as a stream, or many in batches, for prompts from a file.

Here decoding.py and beam_search.py, which choose tokens, meet a tokenizer. Nothing is printed.
"""

import inspect
import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfgpt.data.tokenizer import encode_prompt, load_tokenizer
from hfgpt.data.vocabulary import check_rows
from hfgpt.generation.beam_search import beam_search
from hfgpt.generation.decoding import check_length, generate_stream
from hfgpt.generation.params import SamplingParams
from hfgpt.generation.streamer import StoppingText
from hfgpt.weights import load
from hfgpt.weights.own_code import brings_own_code, load_by_own_code


@dataclass(frozen=True)
class TextGenerator:
    """A model and its tokenizer, on the device where they run.

    Attributes:
        source: folder or Hub id that they came from.
        model: a causal language model in eval mode, as `generate_stream` takes it.
        tokenizer: the model's.
        suppress_mask: (V,), True for ids of the model that the tokenizer does not know; None if it knows all.
    """

    source: str
    model: Any
    tokenizer: Any
    suppress_mask: Tensor | None

    @property
    def context(self) -> int:
        """Tokens that the model has positions for."""
        return self.model.config.max_position_embeddings

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids, at least one.

        Raises:
            ValueError: see `hfgpt.data.tokenizer.encode_prompt`; or the model has no row for one of its ids.
        """
        ids = encode_prompt(self.tokenizer, text, self.source)
        check_rows(self.tokenizer, ids, self.model.config.vocab_size, f"the tokenizer of {self.source}")
        return ids


def load_generator(source: str, trust_remote_code: bool = False) -> TextGenerator:
    """Load a model and its tokenizer, onto a GPU if there is one.

    Args:
        source: folder or Hub id of a model with its tokenizer.
        trust_remote_code: whether code that lies beside the weights may be run, where nothing else knows the model.

    Raises:
        ValueError: there is no such model or tokenizer, its code is not trusted, or keeps no cache.
    """
    model: Any
    if brings_own_code(source):
        model = load_by_own_code(source, None, trust_remote_code)
        check_interface(model, source)
    else:
        model = load(source)
    tokenizer = load_tokenizer(source)
    model.to("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    return TextGenerator(source, model, tokenizer, suppressed_ids(tokenizer, model))


def check_interface(model: Any, source: str) -> None:
    """Refuse (ValueError) a model that `generate_stream` could not call."""
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters or not {"past_key_values", "cache"} & parameters.keys():
        raise ValueError(
            f"{source}: a {type(model).__name__} takes no cache and positions, with which a text is written here. "
            "transformers' own `model.generate(...)` may do without."
        )
    if not isinstance(getattr(model.config, "max_position_embeddings", None), int):
        raise ValueError(f"{source}: its config does not say `max_position_embeddings`, the longest text in tokens.")


def suppressed_ids(tokenizer: Any, model: Any) -> Tensor | None:
    """Ids of a model that stand for no text: a vocabulary rounded up to 50,304 has 47 that GPT-2's tokenizer lacks.

    Returns:
        (V,) booleans on the model's device, or None if the tokenizer knows all.
    """
    suppress_V = torch.ones(model.config.vocab_size, dtype=torch.bool)
    suppress_V[[token_id for token_id in tokenizer.get_vocab().values() if token_id < len(suppress_V)]] = False
    return suppress_V.to(model.device) if suppress_V.any() else None


@dataclass(frozen=True)
class GeneratedText:
    """A finished text.

    Attributes:
        prompt: as it was given.
        new_text: what follows it.
        new_tokens: number of new tokens, with the one that ended the text.
        ended: by "eos", an end-of-text token; "stop", a stop text; or "length".
        seed: of a sample; None for greedy decoding and beam search.
        score: see `hfgpt.generation.beam_search.Beam`; None without beam search.
    """

    prompt: str
    new_text: str
    new_tokens: int
    ended: str
    seed: int | None = None
    score: float | None = None

    def record(self) -> dict[str, Any]:
        """What a line of JSON holds: `text` is the prompt and what follows."""
        record = {"prompt": self.prompt, "text": self.prompt + self.new_text, **asdict(self)}
        return {name: value for name, value in record.items() if value is not None}


class SequenceState:
    """One text while it is generated: takes its ids, and knows when and why it ends."""

    def __init__(self, generator: TextGenerator, prompt: str, params: SamplingParams, seed: int | None = None) -> None:
        self.prompt, self.seed = prompt, seed
        self.ids = generator.encode(prompt)
        check_length(len(self.ids), params.max_new_tokens, generator.context)
        self.text = StoppingText(generator.tokenizer, params.stop)
        self.eos_token_id = generator.tokenizer.eos_token_id
        self.max_new_tokens = params.max_new_tokens
        self.new_text, self.new_tokens, self.ended = "", 0, ""

    def push(self, token_id: int) -> str:
        """Take the next id; returns the text that is complete with it. Ids after the end are ignored."""
        if self.ended:
            return ""
        self.new_tokens += 1
        piece = self.text.push(token_id)
        if token_id == self.eos_token_id:
            self.ended = "eos"
        elif self.text.has_stopped:
            self.ended = "stop"
        elif self.new_tokens == self.max_new_tokens:
            self.ended = "length"
        if self.ended:
            piece += self.text.finish()  # which may show a stop text in the bytes of an incomplete character
        self.new_text += piece
        return piece

    def finished(self, score: float | None = None) -> GeneratedText:
        """The text after its end."""
        return GeneratedText(self.prompt, self.new_text, self.new_tokens, self.ended, self.seed, score)


def continue_text(generator: TextGenerator, prompt: str, params: SamplingParams) -> Iterator[str]:
    """Continue one prompt.

    Args:
        generator: see `load_generator`.
        prompt: may be empty: an end-of-text token then begins a document.
        params: how; with beam search the text comes in one piece, at the end.

    Returns:
        Pieces of the new text, each as soon as it consists of whole characters. An end-of-text token ends it.

    Raises:
        ValueError: at the call itself: the prompt does not fit.
    """
    (seed,) = make_seeds(params, 1)
    sequence = SequenceState(generator, prompt, params, seed)
    if params.num_beams > 1:
        return (text.new_text for (text,) in search_texts(generator, [sequence], params, samples=1))
    return (piece for (piece,) in stream_texts(generator, [sequence], params) if piece)


def generate_texts(
    generator: TextGenerator, prompts: Sequence[str], params: SamplingParams, *, samples: int = 1, batch_size: int = 8
) -> Iterator[list[GeneratedText]]:
    """Continue many prompts, several at a time; a prompt's texts do not depend on the prompts beside it.

    Args:
        generator: see `load_generator`.
        prompts: each may be empty: an end-of-text token then begins a document.
        params: for all. Sample n of every prompt has the seed `params.seed` + n; without one, each has its own.
        samples: texts per prompt, at least 1; with beam search the best ones, at most `num_beams`.
        batch_size: texts that are generated together, at least 1; with beam search prompts.

    Returns:
        The texts of each prompt, as soon as they are finished.

    Raises:
        ValueError: at the call itself: a prompt does not fit, or there are not so many different samples.
    """
    if samples > 1 and params.temperature == 0 and params.num_beams == 1:
        raise ValueError(f"`samples` ({samples}): at `temperature` 0 each would be the same text.")
    if 1 < params.num_beams < samples:
        raise ValueError(f"`samples` ({samples}) must be at most `num_beams` ({params.num_beams}).")
    sequences = []
    for number, prompt in enumerate(prompts, start=1):
        seeds = make_seeds(params, samples if params.num_beams == 1 else 1)
        try:
            sequences += [SequenceState(generator, prompt, params, seed) for seed in seeds]
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}" if len(prompts) > 1 else str(error)) from None
    batches = (sequences[start : start + batch_size] for start in range(0, len(sequences), batch_size))
    if params.num_beams > 1:
        return (texts for batch in batches for texts in search_texts(generator, batch, params, samples))

    def texts() -> Iterator[GeneratedText]:
        for batch in batches:
            for _ in stream_texts(generator, batch, params):
                pass
            yield from (each.finished() for each in batch)

    return map(list, zip(*[texts()] * samples, strict=True))


def make_seeds(params: SamplingParams, samples: int) -> list[int | None]:
    """A seed for each sample of a prompt; None where nothing is sampled."""
    if params.temperature == 0 or params.num_beams > 1:
        return [None] * samples
    if params.seed is None:
        return [secrets.randbits(32) for _ in range(samples)]  # small enough for every reader of JSON
    return [params.seed + sample for sample in range(samples)]


def stream_texts(
    generator: TextGenerator, sequences: Sequence[SequenceState], params: SamplingParams
) -> Iterator[list[str]]:
    """Continue several sequences token by token; yields the pieces of text of each step, one per sequence."""
    input_ids, mask = pad_left([each.ids for each in sequences], generator.model.device)
    pieces: list[str] = []

    def push(next_B: Tensor) -> list[bool]:
        pieces[:] = [each.push(token_id) for each, token_id in zip(sequences, next_B.tolist(), strict=True)]
        return [bool(each.ended) for each in sequences]

    steps = generate_stream(
        generator.model,
        input_ids,
        params,
        attention_mask=mask,
        eos_token_id=generator.tokenizer.eos_token_id,
        generator=[torch.Generator(generator.model.device).manual_seed(each.seed or 0) for each in sequences],
        suppress_mask=generator.suppress_mask,
        is_stopped=push,
    )
    return (list(pieces) for _ in steps)


def search_texts(
    generator: TextGenerator, sequences: Sequence[SequenceState], params: SamplingParams, samples: int
) -> list[list[GeneratedText]]:
    """Continue several sequences by beam search; returns the best `samples` texts of each."""
    input_ids, mask = pad_left([each.ids for each in sequences], generator.model.device)

    def is_stopped(ids: list[int]) -> bool:
        text = generator.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in params.stop)

    found = beam_search(
        generator.model,
        input_ids,
        params,
        attention_mask=mask,
        eos_token_id=generator.tokenizer.eos_token_id,
        suppress_mask=generator.suppress_mask,
        is_stopped=is_stopped if params.stop else None,
    )
    texts: list[list[GeneratedText]] = []
    for sequence, beams in zip(sequences, found, strict=True):
        texts.append([])
        for beam in beams[:samples]:
            state = SequenceState(generator, sequence.prompt, params)
            for token_id in beam.ids:
                state.push(token_id)
            texts[-1].append(state.finished(beam.score))
    return texts


def pad_left(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Put rows of different lengths into one tensor; returns ids and mask, (B, T), with zeros before shorter rows."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Read a file of prompts.

    Args:
        path: a .jsonl file with one object a line, of which `prompt` is the prompt and the other fields are kept, or a
            text with one prompt a line; blank lines are no prompts.

    Returns:
        Objects with `prompt` and perhaps more, at least one.

    Raises:
        ValueError: the file is not UTF-8, holds no prompt, or a line is no such object.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}."
        ) from None
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path} holds no prompt: every line is blank.")
    if path.suffix != ".jsonl":
        return [{"prompt": line} for _, line in numbered]
    return [parse_prompt(line, f"{path}, line {number}") for number, line in numbered]


RESERVED = {"prompt", "text", "settings", *(field.name for field in fields(GeneratedText))}
"""Fields of the lines of JSON that are printed."""


def parse_prompt(line: str, where: str) -> dict[str, Any]:
    """Read one line of a .jsonl file of prompts; an error (ValueError) names `where` it stands."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: no JSON: {error}.") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError(f'{where}: must be an object with a text named "prompt".')
    taken = sorted((RESERVED - {"prompt"}) & record.keys())
    if taken:
        raise ValueError(f"{where}: the fields {taken} are the answer's. Rename them.")
    return record
