"""Tokenizers: a byte-level BPE trained on the run's own text, or one that exists; and text to ids, losslessly."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from hfgpt.system.network import limit_waiting
from hfgpt.system.quoting import quote

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
        # False, not the default: transformers would ask at the terminal whether to run the code beside the weights.
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        # KeyError: JSON that is no tokenizer (transformers 5.23). StrictDataclassError: the config beside it is wrong.
        reason = " ".join(str(error).split())
        raise ValueError(f"no tokenizer {name_or_folder!r}, neither as a folder nor on the Hub: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer {name_or_folder!r} is a {type(tokenizer).__name__}, without a tokenizer.json.")
    if tokenizer.vocab_size == 0:  # transformers 5.23 makes an empty one for a config.json of a known model alone.
        raise ValueError(f"no tokenizer {name_or_folder!r}: there is a model's config.json, but no tokenizer.json.")
    for name in ("is_local", "local_files_only"):  # how it was loaded here; transformers (5.23) would save that with it
        tokenizer.init_kwargs.pop(name, None)
    if tokenizer.eos_token_id is None and (end := end_of_config(tokenizer, name_or_folder)) is not None:
        tokenizer.add_special_tokens({"eos_token": end})
    return tokenizer


def end_of_config(tokenizer: PreTrainedTokenizerFast, name_or_folder: str) -> str | None:
    """The token that a model's config.json or generation_config.json ends a text with, as KoGPT2's does; None if none.

    An ordinary token is none: many configs hold GPT-2's 50256, whatever their tokenizer.
    """
    for file in ("config.json", "generation_config.json"):
        try:
            named = json.loads(Path(cached_file(name_or_folder, file)).read_text(encoding="utf-8"))["eos_token_id"]
        except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is none of a model's, or silent
            continue
        for token_id in named if isinstance(named, list) else [named]:
            is_id = isinstance(token_id, int) and token_id >= 0
            token = tokenizer.backend_tokenizer.id_to_token(token_id) if is_id else None
            added = tokenizer.added_tokens_decoder.get(token_id)
            if token is not None and ((added and added.special) or re.fullmatch(r"<\S+>|\[\S+\]", token)):
                return token
    return None


def check_end_of_text(tokenizer: PreTrainedTokenizerFast, name: str, purpose: str) -> None:
    """Refuse a tokenizer without a token that ends a text, where one is needed.

    Raises:
        ValueError: neither it nor the config beside it names one; `purpose` says what for, and what else helps.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {name!r} has no eos token, {purpose}")


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path, rows: int | None = None) -> None:
    """Write a tokenizer as a model's: it names a pad token, so that its users can make batches.

    That is the eos token, where it names none, or one that the model has no row for. It is no new id, and nothing may
    be taken for padding because it has this id: the attention mask says what is padding.

    Args:
        tokenizer: its pad token may change.
        folder: of the model.
        rows: of the model's embedding, if there is a model.
    """
    pad_id = tokenizer.pad_token_id
    if pad_id is None or (rows is not None and pad_id >= rows):
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.init_kwargs.pop("auto_map", None)  # names code that does not go along
    tokenizer.save_pretrained(folder)


def count_rows(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows that a model needs for every id of a tokenizer: one more than the largest, gaps included."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """A SHA-256 of everything that decides which ids a text gets, equal after saving and loading."""
    return hash_of_state(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)


@lru_cache(maxsize=4)
def hash_of_state(state_json: str, eos_token_id: int | None) -> str:
    """`tokenizer_hash`; a run asks for it again and again, and 50,000 ids take a fifth of a second."""
    state = json.loads(state_json)
    state |= {"truncation": None, "padding": None}  # Leftovers of earlier calls; `encode_arrays` uses neither.
    content = json.dumps([state, eos_token_id], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def bytes_of_ids(tokenizer: PreTrainedTokenizerFast) -> np.ndarray | None:
    """Bytes of text that each id stands for, int64 (largest id + 1,); None if the tokenizer is not byte-level.

    Special tokens, and ids without a token, stand for none.
    """
    if not isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        return None
    added = tokenizer.get_added_vocab()  # they stand as they are; in the others each character spells a byte
    lengths = np.zeros(count_rows(tokenizer), dtype=np.int64)
    for token, token_id in tokenizer.get_vocab().items():
        lengths[token_id] = len(token.encode()) if token in added else len(token)
    lengths[tokenizer.all_special_ids] = 0
    return lengths


def encode_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Turn each text into ids, with no special token: a literal `<|endoftext|>` is text like any other."""
    return [ids.tolist() for ids in encode_arrays(tokenizer, texts)]


def encode_prompt(tokenizer: PreTrainedTokenizerFast, text: str, name: str) -> list[int]:
    """Turn a text into ids, at least one: an empty text becomes the end-of-text token, which begins a document.

    Raises:
        ValueError: the tokenizer, called `name`, does not know a part of it or makes no token of it, or it is empty and
            there is no end-of-text token.
    """
    (ids,) = encode_ids(tokenizer, [text])
    if text and not ids:  # what a BPE without an unknown token does with what it does not know
        raise ValueError(f"the tokenizer {name!r} makes no token of {quote(text)}: it knows nothing of it.")
    if not text:
        check_end_of_text(tokenizer, name, "from which an empty text would start. Give a text.")
    return ids or [tokenizer.eos_token_id]


def encode_arrays(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], split_special_tokens: bool = True
) -> list[np.ndarray]:
    """Like `encode_ids`, as int32 arrays of shape (tokens,); memory stays bounded for texts of any length.

    Without `split_special_tokens` a literal `<|endoftext|>` becomes that token.

    Raises:
        ValueError: the tokenizer does not know a part of a text, and has no token for that.
    """

    def encode(batch: list[str]) -> list[list[int]]:
        try:
            return tokenizer(
                batch,
                add_special_tokens=False,
                split_special_tokens=split_special_tokens,
                return_attention_mask=False,
                verbose=False,  # The ids are cut into rows later: longer than the model's longest sequence is fine.
            )["input_ids"]
        except Exception as error:  # tokenizers (0.23) raises no other
            unknown = next(filter(None, (find_unknown(tokenizer, text) for text in batch)), None)
            if unknown is None:
                raise
            code = f" (U+{ord(unknown):04X})" if len(unknown) == 1 else ""
            raise ValueError(
                f"the tokenizer does not know {quote(unknown)}{code}, and has no token for what it does not know. "
                "Leave it out of the text, or take another tokenizer."
            ) from error

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


def find_unknown(tokenizer: PreTrainedTokenizerFast, text: str) -> str | None:
    """The first word, or character where words are made of smaller tokens, that the tokenizer cannot read."""
    backend = tokenizer.backend_tokenizer
    normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal)] if backend.pre_tokenizer else [normal]
    if isinstance(backend.model, models.Unigram):
        words = list("".join(words))

    def is_known(word: str) -> bool:
        try:
            backend.model.tokenize(word)
        except Exception:  # tokenizers (0.23) raises no other
            return False
        return True

    return next((word for word in dict.fromkeys(words) if not is_known(word)), None)


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
