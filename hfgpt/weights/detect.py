"""Which format a file or folder has, found out without running anything in it."""

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id

from hfgpt.weights.formats import hf_folder, llmc, llms_from_scratch, nanogpt, openai
from hfgpt.weights.lazy_tensors import in_pickle, in_safetensors
from hfgpt.weights.model_parts import SourceModel, Unsaid, named
from hfgpt.weights.state_dict import check_tensors, state_dict_in, unwrap

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".gguf", ".onnx")
"""Endings of files; a source with one of these that does not exist is not looked for on the Hub."""


def read_any(source: str | Path, told: Unsaid) -> tuple[str, SourceModel]:
    """Find out which format a source has, and read it.

    Args:
        source: file, folder or Hub id.
        told: what the user says of the model, where the source does not.

    Raises:
        ValueError: it is damaged, or of no format that is known; in one line that names it.
    """
    path = Path(source)
    try:
        if path.is_file():
            return read_file(path, told)
        if openai.recognises(path):
            check_unused_options("OpenAI's do", told)
            return "openai", openai.read(path)
        check_source_exists(source)
        check_unused_options("a folder's config does", told)
        return hf_folder.read_folder(source)
    except (ValueError, StrictDataclassError) as error:  # a config of strange values raises the latter
        raise named(source, error) from error


def check_source_exists(source: str | Path) -> None:
    """Check that a source is a model folder, or could be the name of a repository on the Hub.

    Raises:
        ValueError: naming it.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{source} is no model folder: it has no config.json.")
        for name in ("config.json", "generation_config.json"):  # transformers (5.23) trips over what is no object
            file = path / name
            if file.is_file() and file.read_text(encoding="utf-8", errors="replace").lstrip()[:1] != "{":
                raise ValueError(f"no model {str(source)!r}: {name} must hold a JSON object.")
        return
    try:
        validate_repo_id(str(source))
    except HFValidationError as error:
        raise ValueError(f"{source}: no such file or folder, and no name that the Hub could know.") from error
    if path.suffix in SUFFIXES:
        raise ValueError(f"{source}: no such file.")


def check_unused_options(who_says: str, told: Unsaid) -> None:
    """Refuse options for what the source itself says.

    Raises:
        ValueError: one of them is given.
    """
    if told.heads is not None or told.activation is not None:
        raise ValueError(f"`--heads` and `--activation` are for files that do not say them; {who_says}.")
    if told.lora_alpha is not None:
        raise ValueError("`--lora-alpha` is for LoRA layers in a file of LLMs-from-scratch's, and this is none.")


def read_file(file: Path, told: Unsaid) -> tuple[str, SourceModel]:
    """Find out what a file is, and read it.

    Raises:
        ValueError: it is damaged, or of no format that is known.
    """
    if llmc.recognises(file) or (file.suffix == ".bin" and not zipfile.is_zipfile(file)):
        check_unused_options("llm.c's do", told)
        return "llm.c", llmc.read(file)
    content: Any = in_safetensors(file) if file.suffix == ".safetensors" else in_pickle(file, nanogpt.allowed_classes())
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not a dictionary of tensors.")
    tensors, notes = unwrap(state_dict_in(content))
    if hf_folder.holds(tensors):
        raise ValueError(f"{file}: one of transformers' files. Give its folder, where its config.json is.")
    for name, family in (("nanogpt", nanogpt), ("llms-from-scratch", llms_from_scratch)):
        if family.recognises(tensors):
            checkpoint = family.read(check_tensors(tensors), content, told)
            return name, replace(checkpoint, notes=[*notes, *checkpoint.notes])
    some = ", ".join(sorted(map(str, content))[:3])
    raise ValueError(f"{file}: no format that hfgpt knows; it holds {some}, ...")
