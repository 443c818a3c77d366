"""What a model expects: of each token of a text, of the one after it, and along the likeliest way on.

One forward pass over the text and one per token of the way. Nothing is drawn here: terminal.py and pictures.py do that.

Shape letters: T tokens of the text, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from hfgpt.generation.decoding import apply_history, check_finite_logits, next_logits, process_logits, take_cache
from hfgpt.generation.generator import TextGenerator
from hfgpt.generation.params import HISTORY, SAMPLING, Rules, Settings
from hfgpt.generation.streamer import REPLACEMENT_CHARACTER, TextStream

VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})
"""White space made visible, for labels of tokens."""


@dataclass(frozen=True)
class Token:
    """A token that may come next.

    Attributes:
        token_id: in the model's vocabulary.
        label: its text, with white space visible, or its bytes where they are no whole characters.
        probability: in [0, 1].
    """

    token_id: int
    label: str
    probability: float


@dataclass(frozen=True)
class TokenLoss(Token):
    """A token of the text, and how the model took it.

    Attributes:
        loss: -ln(probability), in nats.
        rank: 1 for the token that the model held likeliest.
    """

    loss: float
    rank: int


@dataclass(frozen=True)
class Piece:
    """A smallest part of the text that consists of whole characters.

    Attributes:
        text: never empty; the pieces joined are the text.
        tokens: what it consists of; empty for the first token, which nothing was expected of.
    """

    text: str
    tokens: list[TokenLoss]

    @property
    def loss(self) -> float:
        """Of all its tokens together, in nats: -ln of the probability of the text."""
        return math.fsum(token.loss for token in self.tokens)


@dataclass(frozen=True)
class Distribution:
    """What the next token is drawn from, by some settings.

    Attributes:
        label: the settings, as they were given.
        probabilities: of `Exploration.candidates`, in their order.
        rest: probability of all other tokens together.
        entropy: in bits; 0 where one token is certain.
        kept: number of tokens that can come at all.
    """

    label: str
    probabilities: list[float]
    rest: float
    entropy: float
    kept: int


@dataclass(frozen=True)
class PathStep:
    """A step of the likeliest way on.

    Attributes:
        token: the likeliest one, which was taken.
        alternatives: the next ones, in the order of their probability.
        entropy: of what the model expected, in bits.
    """

    token: Token
    alternatives: list[Token]
    entropy: float


@dataclass(frozen=True)
class Exploration:
    """All of it.

    Attributes:
        source: of the model.
        text: that was explored.
        pieces: the text's parts.
        loss: nats per token, the mean over all tokens but the first; None if there are no others.
        candidates: the tokens that the model holds likeliest to come next, by its own distribution.
        distributions: one for each of the settings.
        path: the likeliest way on; it ends with an end-of-text token, or where the model has no position left.
        context: tokens that the model has positions for.
    """

    source: str
    text: str
    pieces: list[Piece]
    loss: float | None
    candidates: list[Token]
    distributions: list[Distribution]
    path: list[PathStep] = field(default_factory=list)
    context: int = 0

    @property
    def perplexity(self) -> float | None:
        """E to the loss."""
        return None if self.loss is None else math.exp(min(self.loss, 700))

    def record(self) -> dict[str, Any]:
        """All of it as one object of JSON; losses in nats, entropies in bits."""
        return {**asdict(self), "perplexity": self.perplexity}


@torch.no_grad()
def explore(
    writer: TextGenerator,
    text: str,
    variants: Mapping[str, Settings],
    *,
    top: int = 10,
    steps: int = 8,
    alternatives: int = 3,
) -> Exploration:
    """Look at what a model expects of a text and after it.

    Args:
        writer: see `hfgpt.generation.generator.load_generator`.
        text: may be empty: then a document is begun.
        variants: settings to compare the next token under, by label; see `hfgpt.generation.params.explored_variants`.
        top: candidates to show, at least 1.
        steps: tokens of the likeliest way on, at least 0.
        alternatives: other tokens to show at each step, at least 0.

    Raises:
        ValueError: the text is longer than the model's context.
        FloatingPointError: the model's logits are no numbers.
    """
    ids = writer.encode(text)
    if len(ids) > writer.context:
        raise ValueError(
            f"the text has {len(ids)} tokens, more than the model's `max_position_embeddings` ({writer.context}). "
            "Shorten it."
        )
    ids_1T = torch.tensor([ids], device=writer.model.device)
    output = writer.model(input_ids=ids_1T, use_cache=True)
    logits_TV = output.logits[0].float().cpu()
    check_finite_logits(logits_TV)
    surprises = surprise_of(writer, ids, logits_TV) if text else []
    losses = [surprise.loss for surprise in surprises]

    probabilities_V = known_distribution(writer, logits_TV[-1])
    candidates = likeliest(writer, probabilities_V, top)
    return Exploration(
        source=writer.source,
        text=text,
        pieces=cut_into_pieces(writer, ids, surprises) if text else [],
        loss=math.fsum(losses) / len(losses) if losses else None,
        candidates=candidates,
        distributions=[
            distribution(label, settings, writer, ids, logits_TV[-1], candidates)
            for label, settings in variants.items()
        ],
        path=likeliest_path(writer, ids_1T, logits_TV[-1], take_cache(writer.model, output), steps, alternatives),
        context=writer.context,
    )


def surprise_of(writer: TextGenerator, ids: list[int], logits_TV: Tensor) -> list[TokenLoss]:
    """How the model took each token but the first, given all before it."""
    expected_TV = logits_TV[:-1].double().log_softmax(-1)
    targets_T1 = torch.tensor(ids[1:])[:, None]
    own_T1 = expected_TV.gather(1, targets_T1)
    ranks = 1 + (expected_TV > own_T1).sum(1)
    return [
        TokenLoss(token_id, token_label(writer.tokenizer, token_id), math.exp(own), max(0.0, -own), rank)
        for token_id, own, rank in zip(ids[1:], own_T1[:, 0].tolist(), ranks.tolist(), strict=True)
    ]


def cut_into_pieces(writer: TextGenerator, ids: list[int], surprises: list[TokenLoss]) -> list[Piece]:
    """Put tokens together until they are whole characters: a Korean syllable may be three of them."""
    text = TextStream(writer.tokenizer)
    pieces, waiting = [], []
    for index, token_id in enumerate(ids):
        waiting += surprises[index - 1 : index] if index else []
        shown = text.push(token_id)
        if index == len(ids) - 1:
            shown += text.finish()
        if shown:
            pieces.append(Piece(shown, waiting))
            waiting = []
    return pieces


def known_distribution(writer: TextGenerator, logits_V: Tensor) -> Tensor:
    """(V,) fp64 probabilities of the next token, without ids that only round the vocabulary's size up."""
    suppress_mask = None if writer.suppress_mask is None else writer.suppress_mask.cpu()
    return apply_history(logits_V[None].double(), Rules(), logits_V[None], None, suppress_mask)[0].softmax(-1)


def distribution(
    label: str, settings: Settings, writer: TextGenerator, ids: list[int], logits_V: Tensor, candidates: list[Token]
) -> Distribution:
    """What the next token is drawn from by `settings`; see `Distribution`."""
    suppress_mask = None if writer.suppress_mask is None else writer.suppress_mask.cpu()
    rules = Rules(**settings.some(*SAMPLING, *HISTORY))
    logits_1V = apply_history(logits_V[None], rules, torch.tensor([ids]), None, suppress_mask)
    shaped_V = process_logits(logits_1V, **settings.some(*SAMPLING))[0].double()
    probabilities_V = shaped_V.softmax(-1)
    candidate_ids = [token.token_id for token in candidates]
    is_other_V = torch.ones_like(probabilities_V, dtype=torch.bool)
    is_other_V[candidate_ids] = False
    return Distribution(
        label=label,
        probabilities=probabilities_V[candidate_ids].tolist(),
        rest=float(probabilities_V[is_other_V].sum()),
        entropy=entropy_bits(probabilities_V),
        kept=int(shaped_V.isfinite().sum()),
    )


def entropy_bits(probabilities_V: Tensor) -> float:
    """-sum p log2 p of a distribution (V,), in bits."""
    return max(0.0, float(-torch.xlogy(probabilities_V, probabilities_V).sum()) / math.log(2))


def likeliest(writer: TextGenerator, probabilities_V: Tensor, count: int) -> list[Token]:
    """The `count` likeliest tokens, in their order."""
    best = probabilities_V.topk(min(count, len(probabilities_V)))
    return [
        Token(token_id, token_label(writer.tokenizer, token_id), probability)
        for probability, token_id in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        if probability > 0
    ]


def likeliest_path(
    writer: TextGenerator, ids_1S: Tensor, logits_V: Tensor, cache: Mapping[str, Any], steps: int, alternatives: int
) -> list[PathStep]:
    """Follow the likeliest token, `steps` times; `cache` holds `ids_1S`, `logits_V` is what comes after."""
    path: list[PathStep] = []
    for _ in range(min(steps, writer.context - ids_1S.size(1))):
        probabilities_V = known_distribution(writer, logits_V)
        taken, *others = likeliest(writer, probabilities_V, 1 + alternatives)
        path.append(PathStep(taken, others, entropy_bits(probabilities_V)))
        if taken.token_id == writer.tokenizer.eos_token_id or len(path) == steps:
            break
        next_11 = torch.tensor([[taken.token_id]], device=ids_1S.device)
        ids_1S = torch.cat([ids_1S, next_11], dim=1)
        logits_1V, cache = next_logits(writer.model, next_11, torch.ones_like(ids_1S), cache)
        logits_V = logits_1V[0].float().cpu()
    return path


def token_label(tokenizer: Any, token_id: int) -> str:
    """The text of a token with its white space visible, or its bytes where they are no whole characters."""
    # Twice, because SentencePiece tokenizers drop the space before the very first token.
    once, twice = (tokenizer.decode([token_id] * n, clean_up_tokenization_spaces=False) for n in (1, 2))
    text = twice[len(once) :]
    if text and REPLACEMENT_CHARACTER not in twice:
        return "".join(c if c.isprintable() else f"<{ord(c):02X}>" for c in text.translate(VISIBLE))
    stored = str(tokenizer.convert_ids_to_tokens(token_id))
    if all(character in BYTE_OF_CHARACTER for character in stored):
        return "<" + " ".join(f"{BYTE_OF_CHARACTER[character]:02X}" for character in stored) + ">"
    return stored


def byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level BPE stands for.

    Source:
        Radford et al. 2019, GPT-2's encoder: a printable byte is the character of that number, and the other bytes are
        the characters from 256 on, in their order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF_CHARACTER = byte_characters()
