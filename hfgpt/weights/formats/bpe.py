"""GPT-2's kind of tokenizer, a byte-level BPE, for formats that have files of their own for it."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PLAIN = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
"""How GPT-2 splits a text before it joins bytes."""


def split_model(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, int], list[str]]:
    """The vocabulary, special tokens among it, and the merges ("a b"), which say all of such a tokenizer.

    Raises:
        ValueError: it does something else besides, which would be lost.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    splitter = {"use_regex": True} | (backend["pre_tokenizer"] or {})  # older files leave it unsaid
    is_plain = (
        model["type"] == "BPE"
        and not any(model[name] for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and not any(model[name] for name in ("byte_fallback", "ignore_merges"))
        and all(splitter.get(name) == value for name, value in PLAIN.items())
        and backend["normalizer"] is None
        and tokenizer("a b")["input_ids"] == tokenizer("a b", add_special_tokens=False)["input_ids"]
    )
    if not is_plain:
        raise ValueError("the format needs a byte-level BPE as GPT-2's; the model's tokenizer is none, or does more.")
    return tokenizer.get_vocab(), [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]


def kept_whole(tokenizer: PreTrainedTokenizerFast, rows: int) -> list[str]:
    """The tokens below `rows` that are looked for in a text before it is split, which GPT-2's files do not say.

    Its one special token is known to all who read them.
    """
    added = sorted(tokenizer.added_tokens_decoder.items())
    return [str(token) for token_id, token in added if token_id < rows and str(token) != END_OF_TEXT]


def write_files(tokenizer: PreTrainedTokenizerFast, rows: int, vocabulary: Path, merges: Path) -> None:
    """Write the two files that GPT-2's tokenizer consists of: token -> id below `rows` as JSON, and a merge a line.

    Raises:
        ValueError: the tokenizer is not of this kind; nothing is written.
    """
    numbers, pairs = split_model(tokenizer)
    in_order = {token: at for token, at in sorted(numbers.items(), key=lambda item: item[1]) if at < rows}
    vocabulary.write_text(json.dumps(in_order), encoding="utf-8")
    lines = ["#version: 0.2", *pairs, ""]  # OpenAI's encoder.py leaves the first and the last out
    merges.write_bytes("\n".join(lines).encode())


def join_model(vocabulary: Path, merges: Path, longest: int) -> PreTrainedTokenizerFast:
    """The tokenizer of OpenAI's files.

    Args:
        vocabulary: JSON, token -> id.
        merges: a line of comment, then "a b" on each line.
        longest: sequence of the model, in tokens.

    Raises:
        ValueError: the files are damaged or do not fit each other.
    """
    try:
        bpe = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # tokenizers (0.23) raises no other
        raise ValueError(f"{vocabulary} and {merges.name}: no byte-level BPE: {error}.") from error
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    if bpe.get_vocab_size() == 0:
        raise ValueError(f"{vocabulary} and {merges.name}: no byte-level BPE: there is no token.")
    end = END_OF_TEXT if bpe.token_to_id(END_OF_TEXT) is not None else None  # named, it would get a new id
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, model_max_length=longest)
