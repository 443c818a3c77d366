"""Text from a saved model: one that is seen as it comes, or many in batches, for prompts from a file.

decoding.py and beams.py choose the tokens; here they meet a tokenizer. Nothing is printed.
"""

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfgpt.data.tokenizer import check_end_of_text, encode_ids, load_tokenizer
from hfgpt.generation.beam_search import beam_search
from hfgpt.generation.decoding import check_length, stream
from hfgpt.generation.params import HISTORY, SAMPLING, SEARCH, Settings
from hfgpt.generation.streamer import StoppingText
from hfgpt.weights import load


@dataclass(frozen=True)
class TextGenerator:
    """A model and its tokenizer, on the device where they write.

    Attributes:
        source: folder or Hub id that they came from.
        model: an `HFGPTForCausalLM` in eval mode.
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
        """Turn a text into ids, at least one: an empty text becomes the end-of-text token, which begins a document.

        Raises:
            ValueError: the text is empty and there is no such token, or the tokenizer is another model's.
        """
        (ids,) = encode_ids(self.tokenizer, [text])
        if not ids:
            check_end_of_text(self.tokenizer, self.source)
            ids = [self.tokenizer.eos_token_id]
        if max(ids) >= self.model.config.vocab_size:
            raise ValueError(
                f"the tokenizer of {self.source} makes the id {max(ids)}, the model's `vocab_size` is "
                f"{self.model.config.vocab_size}. They do not belong together."
            )
        return ids


def load_generator(source: str) -> TextGenerator:
    """Load a model and its tokenizer, onto a GPU if there is one.

    Args:
        source: folder or Hub id of a model with its tokenizer.

    Raises:
        ValueError: there is no such model or tokenizer.
    """
    model, tokenizer = load(source), load_tokenizer(source)
    model.to("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    suppress_mask = suppressed_ids(tokenizer, model.config.vocab_size)
    return TextGenerator(source, model, tokenizer, None if suppress_mask is None else suppress_mask.to(model.device))


def suppressed_ids(tokenizer: Any, vocab_size: int) -> Tensor | None:
    """Which ids of a model no text has: a vocabulary rounded up to 50,304 has 47 that GPT-2's tokenizer does not know.

    Returns:
        (V,) booleans, or None if the tokenizer knows all.
    """
    suppress_V = torch.ones(vocab_size, dtype=torch.bool)
    suppress_V[[token_id for token_id in tokenizer.get_vocab().values() if token_id < vocab_size]] = False
    return suppress_V if suppress_V.any() else None


@dataclass(frozen=True)
class GeneratedText:
    """A text that was written.

    Attributes:
        prompt: as it was given.
        new_text: what follows it.
        new_tokens: tokens written, with the one that ended the text.
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
        made_by = {"seed": self.seed, "score": self.score}
        return {
            "prompt": self.prompt,
            "text": self.prompt + self.new_text,
            "new_text": self.new_text,
            "new_tokens": self.new_tokens,
            "ended": self.ended,
            **{name: value for name, value in made_by.items() if value is not None},
        }


class SequenceState:
    """One text while it is written: takes its ids, and knows when and why it ends."""

    def __init__(self, writer: TextGenerator, settings: Settings) -> None:
        self.text = StoppingText(writer.tokenizer, settings.stop)
        self.eos_token_id = writer.tokenizer.eos_token_id
        self.max_new_tokens = settings.max_new_tokens
        self.pieces: list[str] = []
        self.new_tokens = 0
        self.ended = ""

    def push(self, token_id: int) -> str:
        """Take the next id; returns the text that is certain with it. After the end of the row ids are ignored."""
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
            piece += self.text.finish()  # which may show a stop text in the bytes of a character that never came
        self.pieces.append(piece)
        return piece

    def written(self, prompt: str, seed: int | None = None, score: float | None = None) -> GeneratedText:
        """What the text has become."""
        return GeneratedText(prompt, "".join(self.pieces), self.new_tokens, self.ended, seed, score)


def continue_text(writer: TextGenerator, prompt: str, settings: Settings) -> Iterator[str]:
    """Write on from a prompt.

    Args:
        writer: see `load_generator`.
        prompt: may be empty: then a document is begun.
        settings: with beam search the text comes in one piece, at the end.

    Returns:
        Pieces of the new text, each as soon as it consists of whole characters. An end-of-text token ends it.

    Raises:
        ValueError: at the call itself: the prompt does not fit.
    """
    ids = writer.encode(prompt)
    check_length(len(ids), settings.max_new_tokens, writer.context)
    if settings.num_beams > 1:
        return (written.new_text for (written,) in search(writer, [(prompt, ids)], settings, samples=1))
    row = SequenceState(writer, settings)
    return (piece for (piece,) in stream_rows(writer, [ids], [row], settings, draw_seeds(settings, 1)) if piece)


def generate_texts(
    writer: TextGenerator, prompts: Sequence[str], settings: Settings, *, samples: int = 1, batch_size: int = 8
) -> Iterator[list[GeneratedText]]:
    """Write on from many prompts, several at a time; what stands beside a prompt does not change its texts.

    Args:
        writer: see `load_generator`.
        prompts: each may be empty: then a document is begun.
        settings: for all. Sample n of every prompt has the seed `settings.seed` + n; without one, each has its own.
        samples: texts per prompt, at least 1; with beam search the best ones, at most `num_beams`.
        batch_size: texts that are written together, at least 1; with beam search prompts.

    Returns:
        The texts of each prompt, as soon as they are finished.

    Raises:
        ValueError: at the call itself: a prompt does not fit, or there are not so many different samples.
    """
    if samples > 1 and settings.temperature == 0 and settings.num_beams == 1:
        raise ValueError(f"`samples` ({samples}): at `temperature` 0 each would be the same text.")
    if 1 < settings.num_beams < samples:
        raise ValueError(f"`samples` ({samples}) must be at most `num_beams` ({settings.num_beams}).")
    jobs = []
    for number, prompt in enumerate(prompts, start=1):
        ids = writer.encode(prompt)
        try:
            check_length(len(ids), settings.max_new_tokens, writer.context)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}" if len(prompts) > 1 else str(error)) from None
        jobs.append((prompt, ids))
    if settings.num_beams > 1:
        batches = (jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size))
        return (beams for batch in batches for beams in search(writer, batch, settings, samples))
    seeded = [(prompt, ids, seed) for prompt, ids in jobs for seed in draw_seeds(settings, samples)]

    def texts() -> Iterator[list[GeneratedText]]:
        done: list[GeneratedText] = []
        for start in range(0, len(seeded), batch_size):
            batch = seeded[start : start + batch_size]
            rows = [SequenceState(writer, settings) for _ in batch]
            for _ in stream_rows(writer, [ids for _, ids, _ in batch], rows, settings, [seed for _, _, seed in batch]):
                pass
            for (prompt, _, seed), row in zip(batch, rows, strict=True):
                done.append(row.written(prompt, seed if settings.temperature else None))
                if len(done) == samples:
                    yield done
                    done = []

    return texts()


def draw_seeds(settings: Settings, samples: int) -> list[int]:
    """A seed for each sample of a prompt."""
    if settings.seed is None:
        return [secrets.randbits(32) for _ in range(samples)]  # so small that every reader of JSON keeps them
    return [settings.seed + sample for sample in range(samples)]


def stream_rows(
    writer: TextGenerator,
    prompts_ids: Sequence[list[int]],
    rows: Sequence[SequenceState],
    settings: Settings,
    seeds: Sequence[int],
) -> Iterator[list[str]]:
    """Write several rows token by token; yields the pieces of text of each step, one per row."""
    input_ids, mask = pad_left(prompts_ids, writer.model.device)
    pieces: list[str] = []

    def take(next_B: Tensor) -> list[bool]:
        pieces[:] = [row.push(token_id) for row, token_id in zip(rows, next_B.tolist(), strict=True)]
        return [bool(row.ended) for row in rows]

    steps = stream(
        writer.model,
        input_ids,
        attention_mask=mask,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=writer.tokenizer.eos_token_id,
        generator=[torch.Generator(writer.model.device).manual_seed(seed) for seed in seeds],
        suppress_mask=writer.suppress_mask,
        is_stopped=take,
        **settings.some(*SAMPLING, *HISTORY),
    )
    return (list(pieces) for _ in steps)


def search(
    writer: TextGenerator, batch: Sequence[tuple[str, list[int]]], settings: Settings, samples: int
) -> list[list[GeneratedText]]:
    """Write by beam search; returns the best `samples` texts of each prompt."""
    input_ids, mask = pad_left([ids for _, ids in batch], writer.model.device)

    def is_stopped(ids: list[int]) -> bool:
        text = writer.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in settings.stop)

    found = beam_search(
        writer.model,
        input_ids,
        attention_mask=mask,
        eos_token_id=writer.tokenizer.eos_token_id,
        suppress_mask=writer.suppress_mask,
        is_stopped=is_stopped if settings.stop else None,
        **settings.some("max_new_tokens", "num_beams", *SEARCH, *HISTORY),
    )
    texts = []
    for (prompt, _), beams in zip(batch, found, strict=True):
        rows = [SequenceState(writer, settings) for _ in beams[:samples]]
        for row, beam in zip(rows, beams, strict=False):
            for token_id in beam.ids:
                row.push(token_id)
        texts.append([row.written(prompt, score=beam.score) for row, beam in zip(rows, beams, strict=False)])
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
        path: of a .jsonl file with one object a line, whose `prompt` is the prompt and whose other fields go along, or
            of a text with one prompt a line; blank lines are no prompts.

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
"""Fields of the lines that are answered with."""


def parse_prompt(line: str, where: str) -> dict[str, Any]:
    """Read one line of a .jsonl file of prompts.

    Raises:
        ValueError: naming the place: it is no object with a `prompt`, or has fields that the answer has too.
    """
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
