"""`hfgpt adopt`: a stranger's GPT made a folder that AutoModel loads, and compared with itself."""

import ast
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_imports
from yaml import YAMLError

from hfgpt.adopt.checkpoint import fit, read_checkpoint, tied_names
from hfgpt.adopt.compare import compare
from hfgpt.adopt.constructor import Constructor, describe, find_constructor, parameters_of
from hfgpt.adopt.folder import (
    TRAVELLING,
    Names,
    encode,
    load_file,
    make_names,
    package_of,
    set_token_ids,
    write_code,
    write_readme,
)
from hfgpt.adopt.gpt_call import decode
from hfgpt.adopt.names import unread
from hfgpt.adopt.probe import Findings, constant_buffers, draw_ids, drop_changing, probe
from hfgpt.adopt.source import Program, is_installed
from hfgpt.data.tokenizer import count_rows, load_tokenizer, save_tokenizer
from hfgpt.system.extras import install_command
from hfgpt.system.storage import new_path

LEVEL = "level 1: without a cache that transformers knows, `generate` computes the whole prefix again for every token"


@dataclass(frozen=True)
class Adoption:
    """What became of it.

    Attributes:
        folder: that was written.
        model: name of the model's class.
        compared: what was compared, and with what.
        level: what `generate` costs.
        limit: the longest text in tokens; None if none was found.
        files: names of the Python files in the folder.
        requirements: packages that these import, beside torch and transformers.
        notes: what was done on the way that is not obvious.
    """

    folder: str
    model: str
    compared: str
    level: str
    limit: int | None
    files: list[str]
    requirements: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def adopt(
    what: str,
    out: str | Path,
    config: str | Path | None = None,
    checkpoint: str | Path | None = None,
    tokenizer: str | None = None,
    name: str | None = None,
) -> Adoption:
    """Make a folder that AutoModel loads of a class that turns token ids into logits.

    The class's code is run. A checkpoint is only read.

    Args:
        what: `FILE.py:CLASS`, or `package.module:CLASS` from this folder.
        out: folder to write; it must not exist, or be empty.
        config: YAML or JSON with the constructor's arguments; None takes those in the checkpoint.
        checkpoint: weights; None draws them as the constructor does.
        tokenizer: folder or Hub id of the one that goes along.
        name: of the model; None takes the name of `out`.

    Raises:
        ValueError: the class, the config or the checkpoint cannot be used, or the result differs from the original.
            Nothing is left in `out`.
    """
    out = Path(out)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    path, class_name = split(what)
    names = make_names(name or out.name)
    values = read_config(Path(config)) if config is not None else {}
    with new_path(out) as staged, tempfile.TemporaryDirectory() as code:
        return Adopter(path, class_name, names, Path(code), staged, out).run(
            values, config is not None, Path(checkpoint) if checkpoint is not None else None, tokenizer
        )


def split(what: str) -> tuple[Path, str]:
    """The file and the class that `FILE.py:CLASS` names.

    Raises:
        ValueError: it is not written so, or there is no such file.
    """
    file, colon, class_name = what.rpartition(":")
    if not colon or not class_name.isidentifier():
        raise ValueError(f"`{what}` must be a file and a class, such as my_gpt.py:GPT.")
    path = Path(file) if file.endswith(".py") else Path(*file.split(".")).with_suffix(".py")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file.")
    return path.resolve(), class_name


def read_config(path: Path) -> dict[str, Any]:
    """The constructor's arguments.

    Raises:
        ValueError: it holds no names and values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file.")
    try:
        # Not PyYAML alone: to it `1e-3` is a text.
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML that can be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold the constructor's arguments as names and values.")
    return {str(key): decode(value) for key, value in found.items()}


def merge(given: dict[str, Any], stored: dict[str, Any] | None, source: Path, has_config: bool) -> dict[str, Any]:
    """The user's config, or the checkpoint's where there is none.

    Raises:
        ValueError: the two disagree.
    """
    if stored is None or has_config:
        for key in sorted(given.keys() & (stored or {}).keys()):
            if stored is not None and given[key] != stored[key]:
                raise ValueError(
                    f"`{key}` is {given[key]!r} in the config, and {stored[key]!r} in {source}. Correct the config, or "
                    "leave --config out."
                )
        return given
    return stored


class Adopter:
    """The steps, in their order, and what they share."""

    def __init__(self, path: Path, class_name: str, names: Names, code: Path, staged: Path, out: Path) -> None:
        self.path, self.class_name, self.names = path, class_name, names
        self.code, self.staged, self.out = code, staged, out
        self.reserved = {*TRAVELLING, f"configuration_{names.slug}", f"modeling_{names.slug}"}
        self.notes: list[str] = []

    def run(self, values: dict[str, Any], has_config: bool, checkpoint: Path | None, tokenizer: str | None) -> Adoption:
        """Do it all."""
        tensors: dict[str, Any] | None = None
        if checkpoint is not None:
            tensors, stored = read_checkpoint(checkpoint, self.class_names())
            values = merge(values, stored, checkpoint, has_config)
        program = Program(self.path, self.class_name, self.constants(values), self.reserved)
        values = {key: value for key, value in values.items() if key not in program.replaced}
        self.notes += program.notes
        written = program.write(self.code)
        with package_of(self.code) as package:
            home = self.load(package, program.main.stem)
            module_class = getattr(home, self.class_name)
            if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
                raise ValueError(f"{self.class_name} of {self.path} is no `nn.Module`.")
            constructor = find_constructor(module_class, home, values)
            self.note_unread(values, list(written))
            module, second = build(constructor, module_class, 0), build(constructor, module_class, 1)
            ties = tied_names(module)
            state = module.state_dict()
            if tensors is not None and checkpoint is not None:
                state, notes = fit(tensors, module, checkpoint)
                self.notes += notes
            constants = constant_buffers(module, second, state)
            findings = probe(second, constructor.values)
            constants = drop_changing(second, findings.call, draw_ids(2), constants)
            self.notes += findings.notes
            self.write(program, package, constructor, findings, ties, constants, second, state)
        if tokenizer is not None:
            self.add_tokenizer(tokenizer, findings.vocab_size)
        original, beside = self.original(program, constructor, findings.call)
        length = min(findings.limit or 64, 64)
        vocab = min(findings.vocab_size, 50)
        batches = [draw_ids(vocab, min(length, 9)), draw_ids(vocab, length)[:1], draw_ids(vocab, 1)]
        compared = f"{compare(self.staged, original, state, batches)} {beside}"
        requirements = self.requirements(list(written))
        self.write_readme(checkpoint, findings, compared, requirements, list(written))
        files = sorted(each.name for each in self.staged.glob("*.py"))
        return Adoption(
            str(self.out), self.names.model, compared, LEVEL, findings.limit, files, requirements, self.notes
        )

    def class_names(self) -> set[str]:
        """The names of the file's classes: pickled objects of these are read as their fields."""
        try:
            tree = ast.parse(self.path.read_text(encoding="utf-8-sig"))
        except SyntaxError:  # said when the file is opened for its class
            return set()
        names = {each.name for each in ast.walk(tree) if isinstance(each, ast.ClassDef)}
        return names | {
            alias.name for each in ast.walk(tree) if isinstance(each, ast.ImportFrom) for alias in each.names
        }  # fmt: skip

    def constants(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values that are no arguments of the constructor, and so may be constants of the file."""
        try:
            tree = ast.parse(self.path.read_text(encoding="utf-8-sig"))
        except SyntaxError:
            return {}
        classes = [each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == self.class_name]
        parameters = parameters_of(classes[0]) if classes else []
        if parameters is None or not all(name in values for name in parameters):
            parameters = [] if not parameters else list(values)
        return {name: value for name, value in values.items() if name not in parameters}

    def note_unread(self, values: dict[str, Any], files: list[str]) -> None:
        """Say which of the config's names the code does not have: a dictionary takes a misspelt one without a word."""
        trees = [ast.parse((self.code / each).read_text(encoding="utf-8")) for each in files]
        if names := unread(values, trees):
            self.notes.append(f"nothing in the code reads {', '.join(f'`{name}`' for name in names)} of the config")

    def load(self, package: str, stem: str) -> Any:
        try:
            return load_file(package, stem)
        except (Exception, SystemExit) as error:
            raise ValueError(f"{self.path} cannot be imported: {describe(error)}") from error

    def write(
        self, program: Program, package: str, constructor: Constructor, findings: Findings, ties: list[list[str]],
        constants: list[str], module: nn.Module, state: dict[str, Tensor],
    ) -> None:  # fmt: skip
        """Write code, config and weights into the folder."""
        table = module.get_submodule(findings.embedding) if findings.embedding is not None else None
        hidden_size = table.embedding_dim if isinstance(table, nn.Embedding) else None
        home = (program.main.stem, self.class_name)
        write_code(self.code, self.names, home, constructor, findings, ties, constants, hidden_size)
        generated = load_file(package, f"modeling_{self.names.slug}")
        model = getattr(generated, self.names.model)(getattr(generated, self.names.config)())
        model.gpt.load_state_dict({name: each for name, each in state.items() if name not in constants}, strict=True)
        model.generation_config = GenerationConfig(use_cache=False)
        model.save_pretrained(self.staged)

    def original(self, program: Program, constructor: Constructor, call: Any) -> tuple[dict[str, Any], str]:
        """How a process of its own finds and makes the class: in its own file, where that can be imported."""
        spec = {
            "code": str(self.code),
            "class": self.class_name,
            "arguments": {name: encode(value) for name, value in constructor.values.items()},
            "direct": list(constructor.direct),
            "settings": constructor.settings,
            "make": constructor.code,
            "time_first": call.time_first,
            "given": call.arguments,
            "output": list(call.output),
        }
        if program.only_defines() and not program.replaced:
            names = set(constructor.imports)
            if names <= set(program.main.makers):
                spec |= {
                    "path": [str(each) for each in (*program.roots, *program.far_roots)],
                    "module": program.main.name,
                }
                return spec, f"{self.class_name} in {self.path.name}, by its own forward"
        spec |= {"path": [str(self.code.parent)], "module": f"{self.code.name}.{program.main.stem}"}
        return spec, (
            f"{self.class_name} taken out of {self.path.name}, by its own forward (the file as a whole does more than "
            "define it, or needs what is not installed)"
        )

    def requirements(self, files: list[str]) -> list[str]:
        """What the folder's code imports from elsewhere."""
        found = {each for file in files for each in get_imports(self.code / file)}
        needed = sorted(found - set(sys.stdlib_module_names) - {"torch", "transformers"})
        missing = [each for each in needed if not is_installed(each)]
        if missing:
            raise ValueError(
                f"{self.path} imports {', '.join(missing)}, which is not installed here. Run "
                f"`{install_command(missing)}`, or take the import out of the class."
            )
        return needed

    def add_tokenizer(self, name: str, vocab_size: int) -> None:
        """Put a tokenizer beside the weights, and its special ids into the config."""
        tokenizer = load_tokenizer(name)
        rows = count_rows(tokenizer)
        if rows > vocab_size:
            raise ValueError(
                f"the tokenizer {name} has ids up to {rows - 1}, and the model has {vocab_size} rows. Is it the one "
                "that the model was trained with?"
            )
        save_tokenizer(tokenizer, self.staged, vocab_size)
        set_token_ids(self.staged, tokenizer)

    def write_readme(
        self, checkpoint: Path | None, findings: Findings, compared: str, requirements: list[str], files: list[str]
    ) -> None:
        write_readme(
            self.staged,
            {
                "name": self.out.name,
                "class_name": self.class_name,
                "source": self.path.name,
                "weights": f"those of `{checkpoint.name}`" if checkpoint else "drawn at random; nothing was trained",
                "length": f"up to {findings.limit} tokens; more are refused"
                if findings.limit
                else "no limit was found",
                "compared": compared,
                "requirements": requirements,
                "files": [
                    *files,
                    f"configuration_{self.names.slug}.py",
                    f"modeling_{self.names.slug}.py",
                    *(f"{each}.py" for each in TRAVELLING),
                ],
                "notes": self.notes,
            },
        )


def build(constructor: Constructor, module_class: type[nn.Module], seed: int) -> nn.Module:
    """The module as its constructor draws it from a seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return constructor.build(module_class).eval()


def render(adoption: Adoption) -> str:
    """What a person reads."""
    lines = [
        f"{adoption.folder}: {adoption.model}, {adoption.compared}",
        f"{adoption.level}",
        f"takes up to {adoption.limit} tokens" if adoption.limit else "no limit of its length was found",
        f"code: {', '.join(adoption.files)}",
    ]
    if adoption.requirements:
        lines.append(f"needs beside torch and transformers: {', '.join(adoption.requirements)}")
    lines += [f"note: {each}" for each in adoption.notes]
    lines.append(f'AutoModelForCausalLM.from_pretrained("{adoption.folder}", trust_remote_code=True) loads it')
    return "\n".join(lines)
