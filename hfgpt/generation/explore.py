"""What a model predicts: each token of a text, the one after it, and the most likely continuation.

One forward pass over the text and one per token of the continuation. Nothing is printed or drawn here: that is done by
render.py and explore_plots.py.

Shape letters: T tokens of the text, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hfgpt.generation.decoding import apply_history, check_finite_logits, next_logits, process_logits, take_cache
from hfgpt.generation.generator import TextGenerator
from hfgpt.generation.params import SamplingParams
from hfgpt.generation.streamer import REPLACEMENT_CHARACTER, TextStream

VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})
"""White space made visible, for labels of tokens."""


@dataclass(frozen=True)
class Token:
    """A token that may come next; for its `label` see `token_label`."""

    token_id: int
    label: str
    probability: float


@dataclass(frozen=True)
class TokenLoss(Token):
    """A token of the text; `loss` is -ln(probability), in nats, and `rank` 1 if no token was likelier."""

    loss: float
    rank: int


@dataclass(frozen=True)
class Piece:
    """A smallest part of the text that consists of whole characters.

    Attributes:
        text: never empty; the pieces joined are the text.
        tokens: its tokens without the first one of the text, which is not predicted.
    """

    text: str
    tokens: list[TokenLoss]

    @property
    def loss(self) -> float:
        """Sum over its tokens, in nats: -ln of the probability of the piece."""
        return math.fsum(token.loss for token in self.tokens)


@dataclass(frozen=True)
class Distribution:
    """The distribution of the next token under some params.

    Attributes:
        label: the params, as they were given.
        probabilities: of `Exploration.candidates`, in their order.
        rest: probability of all other tokens together.
        entropy: in bits; 0 where one token is certain.
        kept: number of tokens that the rules leave.
    """

    label: str
    probabilities: list[float]
    rest: float
    entropy: float
    kept: int


@dataclass(frozen=True)
class PathStep:
    """A step of the most likely continuation: the token, the next likeliest ones, and the entropy in bits."""

    token: Token
    alternatives: list[Token]
    entropy: float


@dataclass(frozen=True)
class Exploration:
    """What `explore` found.

    Attributes:
        source: folder or Hub id of the model.
        text: the text.
        pieces: the text's parts.
        loss: nats per token, the mean over all tokens but the first; None if there are no others.
        candidates: the likeliest next tokens of the model's own distribution.
        distributions: one for each of the variants.
        path: the most likely continuation, up to an end-of-text token or the model's last position.
        context: tokens that the model has positions for.
    """

    source: str
    text: str
    pieces: list[Piece]
    loss: float | None
    candidates: list[Token]
    distributions: list[Distribution]
    path: list[PathStep]
    context: int

    @property
    def perplexity(self) -> float | None:
        """E to the loss, or None."""
        return None if self.loss is None else math.exp(min(self.loss, 700))

    def record(self) -> dict[str, Any]:
        """One object for JSON; losses in nats, entropies in bits."""
        return {**asdict(self), "perplexity": self.perplexity}


@torch.no_grad()
def explore(
    generator: TextGenerator,
    text: str,
    variants: Mapping[str, SamplingParams],
    *,
    top: int = 10,
    steps: int = 8,
    alternatives: int = 3,
) -> Exploration:
    """Look at what a model predicts in a text and after it.

    Args:
        generator: see `hfgpt.generation.generator.load_generator`.
        text: may be empty: an end-of-text token then begins a document.
        variants: params to compare the next token under, by label; see `hfgpt.generation.params.explored_variants`.
        top: number of candidates, at least 1.
        steps: tokens of the most likely continuation, at least 0.
        alternatives: other tokens at each step, at least 0.

    Raises:
        ValueError: the text is longer than the model's context.
        FloatingPointError: the model's logits are no numbers.
    """
    ids = generator.encode(text)
    if len(ids) > generator.context:
        raise ValueError(
            f"the text has {len(ids)} tokens, more than the model's `max_position_embeddings` ({generator.context}). "
            "Shorten it."
        )
    ids_1T = torch.tensor([ids], device=generator.model.device)
    output = generator.model(input_ids=ids_1T, use_cache=True)
    logits_TV = output.logits[0].float().cpu()
    check_finite_logits(logits_TV)
    token_losses = score_tokens(generator, ids, logits_TV) if text else []
    losses = [token.loss for token in token_losses]
    next_V = suppress(generator, logits_TV[-1])
    candidates = top_tokens(generator, next_V.double().softmax(-1), top)
    cache = take_cache(generator.model, output)
    return Exploration(
        source=generator.source,
        text=text,
        pieces=split_into_pieces(generator, ids, token_losses) if text else [],
        loss=math.fsum(losses) / len(losses) if losses else None,
        candidates=candidates,
        distributions=[make_distribution(label, params, ids, next_V, candidates) for label, params in variants.items()],
        path=follow_likeliest(generator, ids_1T, next_V, cache, steps, alternatives),
        context=generator.context,
    )


def score_tokens(generator: TextGenerator, ids: list[int], logits_TV: Tensor) -> list[TokenLoss]:
    """Loss, probability and rank of each token but the first, given all before it."""
    log_probabilities_TV = logits_TV[:-1].double().log_softmax(-1)
    own_T1 = log_probabilities_TV.gather(1, torch.tensor(ids[1:])[:, None])
    ranks = 1 + (log_probabilities_TV > own_T1).sum(1)
    return [
        TokenLoss(token_id, token_label(generator.tokenizer, token_id), math.exp(own), max(0.0, -own), rank)
        for token_id, own, rank in zip(ids[1:], own_T1[:, 0].tolist(), ranks.tolist(), strict=True)
    ]


def split_into_pieces(generator: TextGenerator, ids: list[int], token_losses: list[TokenLoss]) -> list[Piece]:
    """Join tokens until they are whole characters: a Korean syllable may be three of them."""
    text = TextStream(generator.tokenizer)
    pieces, waiting = [], []
    for index, token_id in enumerate(ids):
        waiting += token_losses[index - 1 : index] if index else []
        shown = text.push(token_id)
        if index == len(ids) - 1:
            shown += text.finish()
        if shown:
            pieces.append(Piece(shown, waiting))
            waiting = []
    return pieces


def suppress(generator: TextGenerator, logits_V: Tensor) -> Tensor:
    """(V,) logits on the CPU, -inf for ids that the tokenizer does not know."""
    mask_V = generator.suppress_mask
    return logits_V if mask_V is None else logits_V.masked_fill(mask_V.cpu(), -math.inf)


def make_distribution(
    label: str, params: SamplingParams, ids: list[int], logits_V: Tensor, candidates: list[Token]
) -> Distribution:
    """The distribution that `params` sample the next token from; `ids` are those before it."""
    logits_1V = apply_history(logits_V[None], params, torch.tensor([ids]))
    processed_V = process_logits(logits_1V, params)[0].double()
    probabilities_V = processed_V.softmax(-1)
    candidate_ids = [token.token_id for token in candidates]
    is_other_V = torch.ones_like(probabilities_V, dtype=torch.bool)
    is_other_V[candidate_ids] = False
    return Distribution(
        label=label,
        probabilities=probabilities_V[candidate_ids].tolist(),
        rest=float(probabilities_V[is_other_V].sum()),
        entropy=entropy_bits(probabilities_V),
        kept=int(processed_V.isfinite().sum()),
    )


def entropy_bits(probabilities_V: Tensor) -> float:
    """-sum p log2 p of a distribution (V,), in bits."""
    return max(0.0, float(-torch.xlogy(probabilities_V, probabilities_V).sum()) / math.log(2))


def top_tokens(generator: TextGenerator, probabilities_V: Tensor, count: int) -> list[Token]:
    """The `count` likeliest tokens, in their order."""
    best = probabilities_V.topk(min(count, len(probabilities_V)))
    return [
        Token(token_id, token_label(generator.tokenizer, token_id), probability)
        for probability, token_id in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        if probability > 0
    ]


def follow_likeliest(
    generator: TextGenerator, ids_1S: Tensor, logits_V: Tensor, cache: Mapping[str, Any], steps: int, alternatives: int
) -> list[PathStep]:
    """Take the likeliest token `steps` times; `cache` holds `ids_1S`, and `logits_V` are those of the token after."""
    path: list[PathStep] = []
    for _ in range(min(steps, generator.context - ids_1S.size(1))):
        probabilities_V = logits_V.double().softmax(-1)
        taken, *others = top_tokens(generator, probabilities_V, 1 + alternatives)
        path.append(PathStep(taken, others, entropy_bits(probabilities_V)))
        if taken.token_id == generator.tokenizer.eos_token_id or len(path) == steps:
            break
        next_11 = torch.tensor([[taken.token_id]], device=ids_1S.device)
        ids_1S = torch.cat([ids_1S, next_11], dim=1)
        logits_1V, cache = next_logits(generator.model, next_11, torch.ones_like(ids_1S), cache)
        logits_V = suppress(generator, logits_1V[0].float().cpu())
    return path


def token_label(tokenizer: Any, token_id: int) -> str:
    """The text of a token with white space visible, or its bytes where they are no whole characters."""
    # Twice, because SentencePiece tokenizers drop the space before the very first token.
    once, twice = (tokenizer.decode([token_id] * n, clean_up_tokenization_spaces=False) for n in (1, 2))
    text = twice[len(once) :]
    if text and REPLACEMENT_CHARACTER not in twice:
        return "".join(c if c.isprintable() else f"<{ord(c):02X}>" for c in text.translate(VISIBLE))
    stored = str(tokenizer.convert_ids_to_tokens(token_id))
    if all(character in BYTE_OF_CHARACTER for character in stored):
        return "<" + " ".join(f"{BYTE_OF_CHARACTER[character]:02X}" for character in stored) + ">"
    return stored


BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}
"""The byte that each character of a byte-level BPE stands for."""
