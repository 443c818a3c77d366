"""What counting alone achieves: unigram and bigram perplexity, the yardstick of a small run.

A GPT that does not beat the bigram has learnt nothing that a table of pairs does not hold. Both count the training
rows and score exactly the targets that the GPT scores.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class NgramPerplexities:
    """Perplexity on the validation rows: exp of the mean over targets of -log p, at least 1."""

    unigram: float
    bigram: float


class BigramModel:
    """Probability of a token given the one before it, by absolute discounting, interpolated with the unigram.

    With n(...) counts of training pairs (context c, target w), N their number, V the vocabulary's size, D the
    discount and N1+(c·) the number of different targets seen after c:

        p(w)     = (n(w) + 1) / (N + V)                      add-one, so that an unseen token has p > 0
        p(w | c) = max(n(c, w) - D, 0) / n(c) + D * N1+(c·) / n(c) * p(w)
        p(w | c) = p(w)                                      where the context c was never seen

    Both sum to 1 over the vocabulary for every context.

    Args:
        train_rows: token ids in [0, `vocab_size`), integers (N, T + 1); see `ngram_perplexities`.
        vocab_size: number of token ids, V.
        discount: what is taken from each count that is not 0, D, in (0, 1].

    Raises:
        ValueError: `train_rows` has no pair or no such shape, a token id is out of range, or `discount` is.

    Source:
        Ney, Essen & Kneser 1994, "On structuring probabilistic dependences in stochastic language modelling";
        Chen & Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 2. There the
        unigram is discounted too; here it is smoothed by add-one.
    """

    def __init__(self, train_rows: np.ndarray, vocab_size: int, discount: float = 0.75) -> None:
        if not 0 < discount <= 1:
            raise ValueError(f"`discount` must be in (0, 1], got {discount}.")
        contexts, targets = split_pairs("train_rows", train_rows, vocab_size)
        self.vocab_size = vocab_size
        self.discount = discount
        self.unigram_probs = (np.bincount(targets, minlength=vocab_size) + 1) / (len(targets) + vocab_size)
        self.pair_codes, self.pair_counts = np.unique(contexts * vocab_size + targets, return_counts=True)
        self.context_counts = np.bincount(contexts, minlength=vocab_size)
        self.num_followers = np.bincount(self.pair_codes // vocab_size, minlength=vocab_size)

    def log_probability(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Natural log of p(target | context).

        Args:
            contexts: token ids in [0, `vocab_size`), int64 (N,).
            targets: token ids in [0, `vocab_size`), int64 (N,).

        Returns:
            float64 (N,), all below 0 or equal to it, none -inf.
        """
        codes = contexts * self.vocab_size + targets
        index = np.minimum(np.searchsorted(self.pair_codes, codes), len(self.pair_codes) - 1)
        pair_counts = np.where(self.pair_codes[index] == codes, self.pair_counts[index], 0)
        context_counts = self.context_counts[contexts]
        divisors = np.maximum(context_counts, 1)  # an unseen context has no pairs either: 0 / 1
        seen_share = np.maximum(pair_counts - self.discount, 0) / divisors
        unigram_share = np.where(context_counts > 0, self.discount * self.num_followers[contexts] / divisors, 1)
        return np.log(seen_share + unigram_share * self.unigram_probs[targets])

    def unigram_log_probability(self, targets: np.ndarray) -> np.ndarray:
        """Natural log of p(target) without its context: float64 (N,) of token ids (N,)."""
        return np.log(self.unigram_probs[targets])


def ngram_perplexities(
    train_rows: np.ndarray, validation_rows: np.ndarray, vocab_size: int, discount: float = 0.75
) -> NgramPerplexities:
    """Perplexity of a unigram and a bigram model that count the training rows and predict the validation rows.

    A row of T + 1 tokens is T pairs: contexts row[:-1], targets row[1:]. Rows that overlap by one token, as those of
    `block_size` do, count each pair of the stream once; rows of a shorter `stride` count a pair as often as they
    hold it.

    Args:
        train_rows: token ids in [0, `vocab_size`), integers (N, T + 1).
        validation_rows: likewise; another N and T may be used.
        vocab_size: number of token ids.
        discount: the bigram's discount, in (0, 1]; see `BigramModel`.

    Raises:
        ValueError: rows without a pair or of another shape, a token id out of range, or `discount` out of range.
    """
    model = BigramModel(train_rows, vocab_size, discount)
    contexts, targets = split_pairs("validation_rows", validation_rows, vocab_size)
    return NgramPerplexities(
        unigram=float(np.exp(-model.unigram_log_probability(targets).mean())),
        bigram=float(np.exp(-model.log_probability(contexts, targets).mean())),
    )


def split_pairs(name: str, rows: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Contexts and targets, each int64 (N * T,), of rows (N, T + 1); `name` stands in the errors."""
    if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] < 2:
        raise ValueError(f"`{name}` must have shape (N, T + 1) with at least one row and T >= 1, got {rows.shape}.")
    if not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"`{name}` must hold token ids, which are whole numbers, got {rows.dtype}.")
    lowest, highest = int(rows.min()), int(rows.max())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"`{name}` holds token ids from {lowest} to {highest}; `vocab_size` ({vocab_size}) allows 0 to "
            f"{vocab_size - 1}. Were the rows made with another tokenizer?"
        )
    return rows[:, :-1].astype(np.int64).ravel(), rows[:, 1:].astype(np.int64).ravel()
