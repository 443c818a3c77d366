"""Files of other formats: what is it, is it whole, and is it safe to open?"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from hfgpt.weights import llmc, llms_from_scratch, nanogpt, openai
from hfgpt.weights.tables import Checkpoint


def is_foreign(source: Path) -> bool:
    """Whether a source is read here, and not by transformers."""
    return source.is_file() or openai.recognises(source)


def read_foreign(source: Path, heads: int | None, activation: str | None) -> tuple[str, Checkpoint]:
    """Find out what a file or folder is, and read it.

    Args:
        source: file, or folder of OpenAI's.
        heads: number of attention heads, where the source does not say it.
        activation: the MLP's, where the source does not say it.

    Raises:
        ValueError: it is damaged, or of no format that is known.
    """
    if source.is_file():
        return read_file(source, heads, activation)
    refuse_settings("OpenAI's do", heads, activation)
    return "openai", openai.read(source)


def refuse_settings(who_says: str, heads: int | None, activation: str | None) -> None:
    if heads is not None or activation is not None:
        raise ValueError(f"`--heads` and `--activation` are for files that do not say them; {who_says}.")


def read_file(file: Path, heads: int | None, activation: str | None) -> tuple[str, Checkpoint]:
    """Find out what a file is, and read it.

    Raises:
        ValueError: it is damaged, or of no format that is known.
    """
    if file.suffix == ".bin" and not zipfile.is_zipfile(file):
        refuse_settings("llm.c's do", heads, activation)
        return "llm.c", llmc.read(file)
    content = load_file(file) if file.suffix == ".safetensors" and is_safe(file) else unpickle(file)
    if nanogpt.recognises(content):
        return "nanogpt", nanogpt.read(content, heads, activation)
    if llms_from_scratch.recognises(content):
        return "llms-from-scratch", llms_from_scratch.read(content, heads, activation)
    some = ", ".join(sorted(map(str, content))[:3])
    raise ValueError(f"{file}: no format that hfgpt knows; it holds {some}, ...")


def is_safe(file: Path) -> bool:
    """Check a safetensors file's header.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with safe_open(file, framework="pt"):
            return True
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}.") from error


def unpickle(file: Path) -> dict[str, Any]:
    """What `torch.save` wrote, with nothing in it executed; tensors stay on the disk until they are used.

    Raises:
        ValueError: it is damaged, or wants to run something.
    """
    is_zip = zipfile.is_zipfile(file)
    if is_zip:
        with zipfile.ZipFile(file) as archive:
            try:
                damaged = archive.testzip()
            except zipfile.BadZipFile as error:
                raise ValueError(f"{file}: {error}.") from error
        if damaged is not None:
            raise ValueError(f"{file}: {damaged} does not match its checksum.")
    try:
        with torch.serialization.safe_globals(nanogpt.allowed_classes()):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it wants to run {wanted.group(1)}" if wanted else "it is no file of torch.save's"
        raise ValueError(f"{file}: not opened, {reason}.") from error
    except (EOFError, RuntimeError) as error:
        reason = str(error).partition("\n")[0] or "it ends too soon"
        raise ValueError(f"{file}: damaged or no file of torch.save's: {reason}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not a dictionary of tensors.")
    return content
