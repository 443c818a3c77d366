"""Tokenizers: a byte-level BPE trained on the run's own text, or one that exists; and text to ids, losslessly."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hfgpt.system.network import limit_waiting

END_OF_TEXT = "<|endoftext|>"

# The tokenizers library needs about 160 bytes of memory per character of one call (0.23.3), so that a 100 MB file would
# take 16 GB. Longer texts go through it in pieces of about PIECE characters, and CALL characters at a time.
PIECE = 50_000
CALL = 1_000_000
WINDOW = 100  # Characters on each side of a cut that show whether it changes ids.
WORD_END = re.compile(r"(?<=\S)[ \n]")


def train_tokenizer(documents: Iterable[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE as GPT-2's: every text round-trips, and the same documents give the same tokenizer.

    Args:
        documents: the training text, and only that.
        vocab_size: token ids, the 256 bytes and `<|endoftext|>` (bos, eos and unk in one) included; at least 257.
        model_max_length: longest sequence of the model, in tokens; written into the tokenizer's files.

    Returns:
        A tokenizer of `vocab_size` ids, or of fewer if the text has not so many different pairs.

    Raises:
        ValueError: `vocab_size` is below 257.

    Source:
        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2.
    """
    if vocab_size < 257:
        raise ValueError(
            f"`tokenizer.vocab_size` must be at least 257 (256 bytes and {END_OF_TEXT}), got {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # GPT-2's words hold white space only in front, so cutting there changes no word.
    pieces = chain.from_iterable(cut(text, lambda left, right: True) for text in documents)
    tokenizer.train_from_iterator(pieces, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name_or_folder: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer from the Hub or from a folder.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    limit_waiting()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
    except (OSError, ValueError, KeyError) as error:  # KeyError: JSON that is no tokenizer (transformers 5.23).
        reason = " ".join(str(error).split())
        raise ValueError(f"no tokenizer {name_or_folder!r}, neither as a folder nor on the Hub: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer {name_or_folder!r} is a {type(tokenizer).__name__}, without a tokenizer.json.")
    if tokenizer.vocab_size == 0:  # transformers 5.23 makes an empty one for a config.json of a known model alone.
        raise ValueError(f"no tokenizer {name_or_folder!r}: there is a model's config.json, but no tokenizer.json.")
    for name in ("is_local", "local_files_only"):  # how it was loaded here; transformers (5.23) would save that with it
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def check_end_of_text(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Refuse a tokenizer that cannot separate documents.

    Raises:
        ValueError: it has no eos token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {name!r} has no eos token, which goes between documents.")


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """A SHA-256 of everything that decides which ids a text gets, equal after saving and loading."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"truncation": None, "padding": None}  # Leftovers of earlier calls; `encode_arrays` uses neither.
    content = json.dumps([state, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def bytes_of_ids(tokenizer: PreTrainedTokenizerFast) -> np.ndarray | None:
    """Bytes of text that each id stands for, int64 (ids,), special ones for none; None if it is not byte-level."""
    if not isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        return None
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    added = set(tokenizer.get_added_vocab())  # they stand as they are; in the others each character spells a byte
    lengths = np.array([len(token.encode()) if token in added else len(token) for token in tokens])
    lengths[tokenizer.all_special_ids] = 0
    return lengths


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """The ids of each document behind its end-of-text, int32 (1 + tokens,): what rows are cut from."""
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    return [np.concatenate([end, ids]) for ids in encode_arrays(tokenizer, texts)]


def encode_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Turn each text into ids, with no special token: a literal `<|endoftext|>` is text like any other."""
    return [ids.tolist() for ids in encode_arrays(tokenizer, texts)]


def encode_arrays(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], split_special_tokens: bool = True
) -> list[np.ndarray]:
    """Like `encode_ids`, as int32 arrays of shape (tokens,); memory stays bounded for texts of any length.

    Without `split_special_tokens` a literal `<|endoftext|>` becomes that token.
    """

    def encode(batch: list[str]) -> list[list[int]]:
        return tokenizer(
            batch,
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_attention_mask=False,
            verbose=False,  # The ids are cut into rows later: longer than the model's longest sequence is fine here.
        )["input_ids"]

    def is_exact(left: str, right: str) -> bool:
        whole, first, second = encode([left + right, left, right])
        return whole == first + second

    pieces_of_texts = [list(cut(text, is_exact)) for text in texts]
    pieces = list(chain.from_iterable(pieces_of_texts))
    per_call = max(1, CALL // (1 + max(map(len, pieces), default=0)))
    encoded: list[np.ndarray] = []
    for start in range(0, len(pieces), per_call):
        encoded += [np.array(ids, dtype=np.int32) for ids in encode(pieces[start : start + per_call])]
    remaining = iter(encoded)
    return [np.concatenate(list(islice(remaining, len(parts)))) for parts in pieces_of_texts]


def cut(text: str, is_exact: Callable[[str, str], bool]) -> Iterator[str]:
    """Cut a text into pieces of about `PIECE` characters, each cut between a word and white space.

    Args:
        text: of any length. Where no cut is found, the rest stays one piece.
        is_exact: whether a cut between these characters before it and these after it may be made.
    """
    start = 0
    while len(text) - start > PIECE:
        candidates = (match.start() for match in islice(WORD_END.finditer(text, start + PIECE), 100))
        exact = (end for end in candidates if is_exact(text[max(0, end - WINDOW) : end], text[end : end + WINDOW]))
        end = next(exact, None)
        if end is None:
            break
        yield text[start:end]
        start = end
    yield text[start:]
