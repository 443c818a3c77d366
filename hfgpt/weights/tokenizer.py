"""The tokenizer that goes along with a model from one format to another, where both have a place for one."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from hfgpt.data.tokenizer import load_tokenizer, save_tokenizer
from hfgpt.weights.formats import gpt2, nanogpt, openai
from hfgpt.weights.model_parts import SourceModel

FOLDERS = ("hfgpt", "gpt2", "nanochat")
"""Formats whose tokenizer lies beside the weights."""

WITH_TOKENIZER = (*FOLDERS, "openai", "gguf")
"""Formats that have a place for a tokenizer."""


def tokenizer_for(
    source: str | Path, found: str, checkpoint: SourceModel, asked: str | None, to: str
) -> tuple[PreTrainedTokenizerFast | None, list[str]]:
    """The tokenizer that goes along, the one asked for or the source's, and what is to be said of it.

    Args:
        source: file, folder or Hub id.
        found: its format.
        checkpoint: what it holds.
        asked: folder, Hub id or file of the one that the user names.
        to: the destination's format, which may have no place for one.

    Raises:
        ValueError: the one asked for is not there, or the source's is damaged.
    """
    path = Path(source)
    meta = nanogpt.meta_of(path, checkpoint.dataset) if found == "nanogpt" else None
    if to not in WITH_TOKENIZER:
        lies_in = {"openai": path / openai.VOCABULARY, "nanogpt": meta}.get(found, path / "tokenizer.json")
        if lies_in is None or not lies_in.is_file():
            return None, []
        return None, [f"the tokenizer stays behind, in {lies_in}: {to} has no place for one."]
    if asked is not None:
        return nanogpt.read_meta(Path(asked)) if Path(asked).is_file() else load_tokenizer(asked), []
    if found == "openai":
        return openai.read_tokenizer(path), []
    if found == "nanogpt":
        return characters_of(meta, checkpoint.dataset)
    return tokenizer_beside(source, found), []


def characters_of(meta: Path | None, dataset: str) -> tuple[PreTrainedTokenizerFast | None, list[str]]:
    """The tokenizer of a nanoGPT, and what is to be said of it.

    Args:
        meta: where its characters lie, if they were found.
        dataset: name of its data set, if it has one.
    """
    if meta is not None:
        return nanogpt.read_meta(meta), [f"the tokenizer is that of {meta}."]
    if not dataset:
        return None, []
    where = f"nanoGPT's data/{dataset}/{nanogpt.META}, or GPT-2's if there is none"
    return None, [f"no tokenizer goes along: the data set was {dataset!r}; give `--tokenizer`: {where}."]


def tokenizer_beside(source: str | Path, found: str) -> PreTrainedTokenizerFast | None:
    """The tokenizer in a model's folder or repository.

    Raises:
        ValueError: it is damaged.
    """
    path = Path(source)
    if found not in FOLDERS or (path.is_dir() and not (path / "tokenizer.json").is_file()):
        return None
    try:
        return load_tokenizer(str(source))
    except ValueError:
        if path.is_dir():
            raise
        return None  # a repository on the Hub without one


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, to: str, rows: int) -> list[str]:
    """Write a tokenizer into the folder of a model with `rows` rows, as its format has it; a note on what could not be.

    Raises:
        ValueError: OpenAI's files have no place for it.
    """
    if to == "openai":
        openai.write_tokenizer(tokenizer, folder, rows)
        return []
    save_tokenizer(tokenizer, folder, rows)
    return gpt2.write_vocabulary(tokenizer, folder, rows) if to == "gpt2" else []
