"""The folder that AutoModel loads: two generated files, the GPT's own beside them, weights, config and README."""

import importlib
import itertools
import json
import keyword
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import PreTrainedConfig

from hfgpt.adopt.constructor import Constructor
from hfgpt.adopt.probe import Findings

HERE = Path(__file__).parent
TRAVELLING = ("adopted_gpt", "gpt_call")
"""Files of this room that go along."""

ALIASES = {
    "vocab_size": ("vocab_size", "n_vocab", "vocab_len", "num_tokens", "n_tokens", "ntoken", "vocabulary_size",
                   "ntokens", "vocab"),
    "hidden_size": ("hidden_size", "n_embd", "emb_dim", "d_model", "n_embed", "embed_dim", "dim", "embedding_dim",
                    "model_dim", "width", "hidden_dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_blocks", "n_blocks"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "nhead", "heads"),
}  # fmt: skip
"""transformers' names of sizes, and what GPTs call them."""

_numbers = itertools.count()


@dataclass(frozen=True)
class Names:
    """What things are called in the folder.

    Attributes:
        slug: of the files and the model type.
        config: the config's class.
        model: the model's class.
    """

    slug: str
    config: str
    model: str


def make_names(name: str) -> Names:
    """Names of files and classes, from the name of the model.

    Raises:
        ValueError: nothing of it can be in a name.
    """
    words = [word for word in re.split(r"[^A-Za-z0-9]+", name) if word]
    stem = "".join(word[0].upper() + word[1:] for word in words)
    if not stem or not stem[0].isalpha() or keyword.iskeyword(stem):
        raise ValueError(f"`--name` ({name!r}) must begin with a letter: classes and files are called after it.")
    return Names("_".join(words).lower(), f"{stem}Config", f"{stem}ForCausalLM")


@contextmanager
def package_of(folder: Path) -> Iterator[str]:
    """The name under which the files of a folder can be imported, beside one another, and nothing else of theirs."""
    name = f"hfgpt_adopted_{next(_numbers)}"
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    try:
        yield name
    finally:
        for each in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
            del sys.modules[each]


def load_file(package: str, stem: str) -> ModuleType:
    """Import a file of such a folder, and what it imports."""
    importlib.invalidate_caches()
    return importlib.import_module(f"{package}.{stem}")


def field_names(values: Mapping[str, Any]) -> dict[str, str]:
    """Argument -> its name in the config: its own, unless transformers means something else by it."""
    taken = set(dir(PreTrainedConfig())) | {"arguments"}
    return {name: f"gpt_{name}" if name in taken or not name.isidentifier() else name for name in values}


def encode(value: Any) -> Any:
    """An argument as config.json holds it; `decode` in the folder is the way back."""
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, tuple):
        return {"tuple": [encode(each) for each in value]}
    if isinstance(value, Mapping):
        return {name: encode(each) for name, each in value.items()}
    return [encode(each) for each in value] if isinstance(value, list) else value


def aliases(constructor: Constructor, fields: Mapping[str, str], sizes: Mapping[str, int | None]) -> dict[str, str]:
    """Transformers' name of a size -> the argument that is it; one that measures another size is none."""
    found = {}
    for standard, names in ALIASES.items():
        for name in names:
            value = constructor.values.get(name)
            if type(value) is int and (sizes.get(standard) in (None, value)):
                found[standard] = fields[name]
                break
    limit = sizes["max_position_embeddings"]
    named = [name for name, value in constructor.values.items() if type(value) is int and value == limit]
    likely = [name for name in named if re.search(r"block|ctx|context|pos|len|seq|window", name.lower())]
    if limit is not None and likely:
        found["max_position_embeddings"] = fields[likely[0]]
    return found


def write_code(
    folder: Path,
    names: Names,
    home: tuple[str, str],
    constructor: Constructor,
    findings: Findings,
    ties: list[list[str]],
    constants: list[str],
    hidden_size: int | None,
) -> None:
    """Write the config's and the model's file, and the wrapper that both need, beside the GPT's own.

    Args:
        folder: that holds the GPT's own files.
        names: of the new files and classes.
        home: the file of the GPT's class, and the class.
        constructor: how it is made.
        findings: how it is called.
        ties: groups of names of one parameter.
        constants: buffers that the constructor always makes the same.
        hidden_size: width of its embedding, if it has one.
    """
    fields = field_names(constructor.values)
    sizes = {
        "vocab_size": findings.vocab_size,
        "hidden_size": hidden_size,
        "max_position_embeddings": findings.limit,
    }
    attribute_map = aliases(constructor, fields, sizes)
    own = {name: size for name, size in sizes.items() if name not in attribute_map and name not in fields}
    is_vocab = "vocab_size" in attribute_map
    shared = {
        "names": names,
        "stem": home[0],
        "class_name": home[1],
        "constructor": constructor,
        "findings": findings,
        "tied": {f"gpt.{name}": f"gpt.{group[0]}" for group in ties for name in group[1:]},
        "constants": constants,
        "arguments": fields,
        "values": {fields[name]: encode(value) for name, value in constructor.values.items()},
        "sizes": own,
        "attribute_map": {name: target for name, target in attribute_map.items() if name != target},
        "vocab_argument": attribute_map.get("vocab_size") if is_vocab else None,
    }
    templates = open_templates()
    for kind in ("configuration", "modeling"):
        text = templates.get_template(f"adopted_{kind}.py.jinja").render(shared)
        (folder / f"{kind}_{names.slug}.py").write_text(text, encoding="utf-8")
    for each in TRAVELLING:
        shutil.copyfile(HERE / f"{each}.py", folder / f"{each}.py")


def open_templates() -> Environment:
    """The templates of what is generated."""
    templates = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    templates.filters["repr"] = repr
    return templates


def set_token_ids(folder: Path, tokenizer: Any) -> None:
    """Put the tokenizer's special ids into config.json and generation_config.json."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    for file in ("config.json", "generation_config.json"):
        path = folder / file
        content = json.loads(path.read_text(encoding="utf-8"))
        content |= {name: getattr(tokenizer, name) for name in names}
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_readme(folder: Path, values: dict[str, Any]) -> None:
    """Write what a reader of the folder should know."""
    templates = open_templates()
    (folder / "README.md").write_text(
        templates.get_template("adopted_readme.md.jinja").render(values), encoding="utf-8"
    )
