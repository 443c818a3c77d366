"""Which files of a model folder a push sends, and what must not be in them.

huggingface_hub uploads whatever a folder holds. Here only what is on `LIST` is sent. The Hub is not asked.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath
from shlex import quote
from typing import Any

from huggingface_hub import get_token
from torch import Tensor

from hfgpt.config.loading import config_yaml, load_config
from hfgpt.weights.formats.hf_folder import read_files, read_folder, weight_files
from hfgpt.weights.lazy_tensors import LazyTensor, read
from hfgpt.weights.model_parts import build_from
from hfgpt.weights.remote_code import MODEL_TYPE, code_files, describe_other_code, read_config

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
LIST = (
    *WEIGHTS,
    *("*.gguf", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
    *("run.yaml", "results.json", "metrics.jsonl", "samples.md", "README.md", ".eval_results/*.yaml"),
    *("*.png", "*.jpg", "*.svg"),
)
"""What push sends, besides the code that config.json names, and nothing else."""

REASONS = (
    (".env*", "secrets"),
    ("*.env", "secrets"),
    ("checkpoint-*", "checkpoint"),
    ("superseded-checkpoint-*", "checkpoint"),
    ("training_args.bin", "pickle that holds the Hub's token and paths of this machine"),
    ("optimizer*", "optimizer state"),
    ("*.lock", "lock"),
    ("*.bin", "pickle"),
    ("*.pt", "pickle"),
    ("*.pth", "pickle"),
    ("*.pkl", "pickle"),
    (".pulled.json", "says where this folder is from"),
    ("replaced-code-*", "code from before `hfgpt update-code`"),
    ("*", "not on the list"),
)
"""Why what stays does so: the first pattern that fits."""

RUN_FILE, RESULTS_FILE = "run.yaml", "results.json"
PATH_FIELDS = ("output_dir", "init_from", "tokenizer.name", "data.source", "data.files", "data.validation_files")
TOKENS_OF_TEXT = ("tokenizer.json", "vocab.json", "merges.txt")
"""Files of pieces of the training text, in which a path is a token like any other."""

SECRET = re.compile(
    rb"\b(?:hf_|api_org_)[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_\w{60}|\bsk-[\w-]{32}|\bAKIA[A-Z0-9]{16}"
)
SOMEBODYS_HOME = re.compile(rb"(?:/home/|/Users/|\b[A-Za-z]:[\\/]{1,2}Users[\\/]{1,2})[^/\\\s\"']+")
METADATA_BYTES = 64 * 2**20
"""How much of a GGUF file is looked through: its texts come before its tensors."""


@dataclass(frozen=True)
class Plan:
    """What a push would do.

    Attributes:
        folder: that is pushed.
        files: path in the repository -> the file, or its content where it is not sent as it is.
        skipped: name in the folder -> why it is not sent.
        notes: what a person should know.
    """

    folder: Path
    files: dict[str, Path | bytes]
    skipped: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def size(self, name: str) -> int:
        """Bytes of a file that is sent or skipped, by name."""
        source = self.files.get(name, self.folder / name)
        if isinstance(source, bytes):
            return len(source)
        inside = source.rglob("*") if source.is_dir() else [source]
        return sum(path.lstat().st_size for path in inside if not path.is_dir())


def plan_push(folder: str | Path, token: str | None = None, own_code: bool = False) -> Plan:
    """Decide what of a folder goes to the Hub, and refuse what must not. The Hub is not asked.

    Args:
        folder: of a model: of a run, a checkpoint, or what `save_pretrained` left.
        token: that must be in none of the files, besides all that look like one and that of this machine.
        own_code: whether the folder's code may be another than this hfgpt's.

    Raises:
        ValueError: there is no model, it is damaged or not a number, its code is not this hfgpt's, the run is not
            finished, or a file that would go holds a token or a path of somebody's home.
    """
    folder = Path(folder)
    config = read_config(folder)
    if (folder / RUN_FILE).is_file() and not (folder / RESULTS_FILE).is_file():
        raise ValueError(
            f"{folder} holds a run that is not finished: it has no {RESULTS_FILE}. Go on with `hfgpt train --resume`, "
            "or push one of its checkpoints."
        )
    allowed = [*LIST, *code_files(folder, config)]
    difference = None if own_code else describe_other_code(folder)
    if difference is not None:
        raise ValueError(f"{difference} Nothing was pushed. If it is meant to differ, `--own-code` sends it.")
    files: dict[str, Path | bytes] = {}
    skipped: dict[str, str] = {}
    notes: list[str] = []
    for name, path in entries(folder):
        if path.is_file() and any(fnmatch(name, pattern) for pattern in allowed):
            if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{path} is a link to {path.resolve()}, outside of the folder. Put the file there.")
            files[name] = path
        else:
            skipped[name] = next(reason for pattern, reason in REASONS if fnmatch(name, pattern))
    if not any(fnmatch(name, pattern) for name in files for pattern in WEIGHTS[:2]):
        pickles = ", ".join(name for name in skipped if name.endswith(".bin")) or "none"
        raise ValueError(
            f"{folder} has no weights in .safetensors (pickles: {pickles}). `hfgpt convert` writes a folder that has."
        )
    if RUN_FILE in files:
        content, shortened = shareable_run(folder / RUN_FILE)
        if shortened:
            files[RUN_FILE] = content
            notes.append(f"{RUN_FILE} goes without folders of this machine: {', '.join(shortened)}")
    plan = Plan(folder, files, skipped, notes)
    for name, source in files.items():
        check_secrets(name, source, folder, [token, get_token()])
    if config.get("model_type") in (None, MODEL_TYPE, "gpt2"):
        check_model_files(folder)
    else:
        check_finite(folder, read_files(weight_files(folder)))
        notes.append(f"the code of a {config['model_type']!r} was not run; `hfgpt check {quote(str(folder))}` runs it")
    return plan


def entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """What lies in a folder, subfolders as one entry but for that of evaluation results."""
    for path in sorted(folder.iterdir()):
        if path.name == ".eval_results" and path.is_dir():
            yield from ((f"{path.name}/{inside.name}", inside) for inside in sorted(path.iterdir()))
        else:
            yield path.name, path


def shareable_run(path: Path) -> tuple[bytes, list[str]]:
    """A run without the folders of this machine: of a path that leads elsewhere only its last name is left.

    The file itself stays as it is, since the run is known by it.

    Returns:
        The YAML to send, and the knobs whose value was shortened.

    Raises:
        ValueError: the file is no run of this version of hfgpt.
    """
    try:
        config = load_config(path)
    except ValueError as error:
        told = str(error)
        raise ValueError(told if told.startswith(str(path)) else f"{path}: {told}") from error
    shortened: list[str] = []
    for knob in PATH_FIELDS:
        section, _, name = knob.rpartition(".")
        holder: Any = getattr(config, section) if section else config
        value = getattr(holder, name)
        short = [last_name(one) for one in value] if isinstance(value, list) else last_name(value)
        if short != value:
            shortened.append(f"`{knob}`")
            changed: Any = replace(holder, **{name: short})
            config = replace(config, **{section: changed}) if section else changed
    return config_yaml(config).encode(), shortened


def last_name(value: Any) -> Any:
    """The last name of a path that is absolute, or leads up or home; anything else as it is."""
    if not isinstance(value, str):
        return value
    path = PureWindowsPath(value) if re.match(r"[A-Za-z]:[\\/]|\\\\", value) else PurePosixPath(value)
    leads_elsewhere = path.is_absolute() or ".." in path.parts or value.startswith("~")
    return path.name if leads_elsewhere else value


def check_secrets(name: str, source: Path | bytes, folder: Path, tokens: list[str | None]) -> None:
    """Refuse a file that would go if it holds a token, or a path that tells whose machine this is.

    Raises:
        ValueError: naming the file and, for text, the line; never the secret.
    """
    content = searchable(source)
    patterns = [(SECRET, "a token")]
    patterns += [(re.compile(re.escape(token.encode())), "the token of the Hub") for token in tokens if token]
    if name not in TOKENS_OF_TEXT:
        here = {str(place) for place in (Path.home(), Path.cwd(), folder.resolve()) if len(place.parts) > 2}
        for place in sorted({*here, str(Path.home())} - {"/"}):
            boundary = re.compile(rb"(?<![\w./-])" + re.escape(os.fsencode(place)) + rb"(?![\w.-])")
            patterns.append((boundary, "a path of this machine"))
        if name != "samples.md":  # the model wrote it, after its text
            patterns.append((SOMEBODYS_HOME, "a path of somebody's home"))
    for pattern, what in patterns:
        found = pattern.search(content)
        if found is not None:
            line = content.count(b"\n", 0, found.start()) + 1
            raise ValueError(f"{folder / name}, line {line}: holds {what}, so nothing was pushed. Take it out.")


def searchable(source: Path | bytes) -> bytes:
    """The part of a file that can hold text: all of it, but for the tensors."""
    if isinstance(source, bytes):
        return source
    with source.open("rb") as file:
        if source.suffix == ".safetensors":
            return file.read(min(int.from_bytes(file.read(8), "little"), METADATA_BYTES))
        return file.read(METADATA_BYTES if source.suffix == ".gguf" else -1)


def check_model_files(folder: Path) -> None:
    """Check that the weights are those of the config, all there and all numbers.

    Raises:
        ValueError: naming the tensor.
    """
    _, checkpoint = read_folder(folder)
    check_finite(folder, checkpoint.tensors)
    build_from(folder, checkpoint)


def check_finite(folder: Path, tensors: Mapping[str, LazyTensor | Tensor]) -> None:
    """Check that all weights are numbers.

    Raises:
        ValueError: naming the tensor.
    """
    for name, tensor in tensors.items():
        if not read(tensor).isfinite().all():
            raise ValueError(f"{folder}: {name} holds NaN or infinity. Nothing was pushed.")
