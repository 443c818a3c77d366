"""The code that a class needs, taken out of its file and the local files it imports; read, never run.

What trains, plots or reads data beside the class stays behind, and so do the packages that only that needs. The files
are laid side by side and import one another by `from .x import y`: transformers (5.24) copies no others to its cache.
"""

import ast
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from hfgpt.adopt.names import (
    DEFINITIONS,
    is_main_guard,
    is_special,
    made_by,
    mentioned_in,
    needed_by,
    only_declares,
    without_methods,
)
from hfgpt.adopt.rewrite import Edits, render

PROCESS_WIDE = ("set_default_dtype", "set_default_device", "set_default_tensor_type")
"""What changes numbers in the whole process, called in the body of a file: left out it would change the model."""

FOLDERS_UP = 3
"""How far above a file its imports are looked for, where Python itself does not find them."""


@dataclass
class SourceFile:
    """A Python file.

    Attributes:
        path: where it is.
        name: with dots, as its own files import it.
        text: what is in it.
        body: its statements, but for what runs only as a program.
        makers: name -> the statements that make or change it.
        stem: of the copy.
        kept: statements that go along, by index; of an import, the names that do.
        constants: names whose value the user gives -> the value.
        local: nodes of imports that are rewritten -> the file each comes from.
    """

    path: Path
    name: str
    text: str
    body: list[ast.stmt]
    makers: dict[str, list[int]]
    stem: str = ""
    kept: dict[int, set[str]] = field(default_factory=dict)
    constants: dict[str, object] = field(default_factory=dict)
    imports: dict[ast.stmt, list[tuple[ast.alias, "SourceFile", bool]]] = field(default_factory=dict)
    stars: dict[ast.stmt, tuple["SourceFile", set[str]]] = field(default_factory=dict)


class Program:
    """A class, and all that it needs of the files around it.

    Attributes:
        files: that go along, by path.
        notes: what was left behind that a method nobody calls would need.
        replaced: names of constants that took the user's value.
    """

    def __init__(self, path: Path, class_name: str, constants: dict[str, object], reserved: set[str]) -> None:
        self.files: dict[Path, SourceFile] = {}
        self.constants, self.reserved, self.replaced = constants, reserved, set[str]()
        self.notes: list[str] = []
        self.mentioned: set[str] = set()
        self.done: set[tuple[Path, str, bool]] = set()
        package = path.parent
        while (package / "__init__.py").is_file():
            package = package.parent
        self.roots = list(dict.fromkeys([path.parent, package]))
        self.far_roots = [each for each in list(package.parents)[:FOLDERS_UP] if each not in self.roots]
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        self.main = self.open(path, name)
        self.check_class(class_name)
        before = -1
        while before != (before := len(self.mentioned) + len(self.done)):  # methods that others turn out to call
            self.done.clear()
            self.require(self.main, class_name, True, [])
        for name in self.config_classes():
            self.try_to_require(self.main, name, f"`{name}`")
        self.keep_uncalled_methods_running()

    def check_class(self, class_name: str) -> None:
        """Refuse a file without the class, or that changes what torch does by default."""
        if class_name not in self.main.makers:
            classes = [each.name for each in self.main.body if isinstance(each, ast.ClassDef)]
            raise ValueError(f"{self.main.path} has no {class_name!r}. Its classes are {', '.join(classes) or 'none'}.")
        for statement in self.main.body:
            if isinstance(statement, ast.Expr) and mentioned_in(statement) & set(PROCESS_WIDE):
                raise ValueError(
                    f"{self.main.path}, line {statement.lineno}: `{ast.unparse(statement)}` changes the numbers of the "
                    "whole process, and would not go along. Set dtype and device in the class instead."
                )

    def open(self, path: Path, name: str) -> SourceFile:
        """Read a file."""
        path = path.resolve()
        if path in self.files:
            return self.files[path]
        text = path.read_text(encoding="utf-8-sig")
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            raise ValueError(
                f"{path}, line {error.lineno}: no Python that this Python can read: {error.msg}."
            ) from error
        body = [each for each in tree.body if not is_main_guard(each)]
        makers: dict[str, list[int]] = {}
        for index, statement in enumerate(body):
            for made in made_by(statement):
                makers.setdefault(made, []).append(index)
        for made, indices in list(makers.items()):
            # A call such as `torch.manual_seed(1)` changes what an import brought, or a builtin; it makes no name.
            own = [index for index in indices if not isinstance(body[index], ast.Expr)]
            if not own or any(isinstance(body[index], ast.Import | ast.ImportFrom) for index in own):
                makers[made] = own
            if not own:
                del makers[made]
        file = self.files[path] = SourceFile(path, name, text, body, makers)
        file.stem = self.free_stem(path, name)
        for index, statement in enumerate(body):
            if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
                file.kept[index] = {alias.name for alias in statement.names}
        return file

    def free_stem(self, path: Path, name: str) -> str:
        taken = {file.stem for file in self.files.values()} | self.reserved
        parts = name.split(".") if path.name != "__init__.py" else [*name.split("."), "init"]
        parts = [part for part in parts if part != "__init__"] or ["init"]
        stems = ["_".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        stems += [f"{stems[-1]}_{number}" for number in range(2, 100)]
        return next(stem for stem in stems if stem not in taken and stem.isidentifier())

    def config_classes(self) -> list[str]:
        """Dataclasses of the file, and others that are called a config: one may be what the constructor takes."""
        return [
            each.name
            for each in self.main.body
            if isinstance(each, ast.ClassDef)
            and (
                "dataclass" in "".join(ast.unparse(one) for one in each.decorator_list)
                or any(word in each.name.lower() for word in ("config", "cfg", "args", "hparams", "params"))
            )
        ]

    def require(self, file: SourceFile, name: str, is_called: bool, why: list[str]) -> None:
        """Take along what makes a name, and all that this needs.

        Raises:
            ValueError: it is made by what runs when the file is run, or comes from what cannot be followed.
        """
        if (file.path, name, is_called) in self.done:
            return
        self.done.add((file.path, name, is_called))
        indices = file.makers.get(name)
        if indices is None:
            self.require_from_star(file, name, is_called, why)
            return
        where = [*why, f"`{name}` ({file.path.name}, line {file.body[indices[0]].lineno})"]
        if file is self.main and name in self.constants and not isinstance(file.body[indices[0]], DEFINITIONS):
            self.replace_constant(file, name, indices)
            return
        for index in indices:
            statement = file.body[index]
            is_change = isinstance(statement, ast.Expr)
            if not is_change and not only_declares(statement):
                raise ValueError(self.say_body(file, statement, where))
            self.keep(file, index, name, is_called, where)

    def replace_constant(self, file: SourceFile, name: str, indices: list[int]) -> None:
        file.constants[name] = self.constants[name]
        file.kept[indices[0]] = {name}
        self.replaced.add(name)

    def say_body(self, file: SourceFile, statement: ast.stmt, where: list[str]) -> str:
        first = where[1] if len(where) > 1 else where[0]
        name = first.split("`")[1]
        line = ast.unparse(statement).partition("\n")[0]
        return (
            f"{file.path}: the class needs {' and that '.join(where[1:]) or where[0]}, which line {statement.lineno} "
            f"(`{line}`) makes when the file is run as a program; adopt does not run it. Give the value in --config, "
            f"such as `{name}: 65`, or write it into the file."
        )

    def keep(self, file: SourceFile, index: int, name: str, is_called: bool, why: list[str]) -> None:
        """Take a statement along, and what it needs."""
        statement = file.body[index]
        file.kept.setdefault(index, set()).add(name)
        if isinstance(statement, ast.Import | ast.ImportFrom):
            self.follow(file, statement, {name}, is_called, why)
            return
        seen: ast.stmt = statement
        if isinstance(statement, ast.ClassDef) and is_called:
            methods = {each.name for each in statement.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}
            seen = without_methods(statement, {each for each in methods if is_special(each) or each in self.mentioned})
        self.mentioned |= mentioned_in(seen) if is_called else set()
        for inner in ast.walk(statement):
            if isinstance(inner, ast.Import | ast.ImportFrom):
                self.follow(file, inner, {alias.asname or alias.name for alias in inner.names}, is_called, why)
        for needed in sorted(needed_by(seen)):
            self.require(file, needed, is_called, why)

    def follow(
        self, file: SourceFile, node: ast.Import | ast.ImportFrom, names: set[str], is_called: bool, why
    ) -> None:
        """Follow an import to the file it comes from, if that is a local one."""
        for alias in node.names:
            bound = alias.asname or alias.name
            if bound not in names and bound.partition(".")[0] not in names:
                continue
            if isinstance(node, ast.Import):
                target = self.find(file, alias.name, 0)
                if target is not None:
                    if alias.asname is None and "." in alias.name:
                        raise ValueError(
                            f"{file.path}, line {node.lineno}: `import {alias.name}` of a local file cannot be copied "
                            f"beside the weights. Write `from {alias.name} import ...`."
                        )
                    self.add_import(file, node, alias, target, True, is_called, why)
                continue
            base = node.module or ""
            submodule = self.find(file, f"{base}.{alias.name}".strip("."), node.level)
            target = self.find(file, base, node.level) if base or node.level else None
            if target is not None and (alias.name in target.makers or submodule is None):
                if alias.name not in target.makers and not any(map(is_star, target.body)) and target is not submodule:
                    if target.path.name == "__init__.py" or alias.name != "*":
                        raise ValueError(f"{file.path}, line {node.lineno}: {target.path} has no {alias.name!r}.")
                self.add_import(file, node, alias, target, False, is_called, why)
            elif submodule is not None:
                self.add_import(file, node, alias, submodule, True, is_called, why)
            elif node.level:
                raise ValueError(f"{file.path}, line {node.lineno}: there is no file for `{ast.unparse(node)}`.")

    def add_import(self, file, node, alias, target: SourceFile, is_module: bool, is_called: bool, why) -> None:
        found = file.imports.setdefault(node, [])
        if all(each is not alias for each, _, _ in found):
            found.append((alias, target, is_module))
        if not is_module:
            self.require(target, alias.name, is_called, why)
            return
        bound = alias.asname or alias.name
        used = {
            each.attr
            for statement in file.body
            for each in ast.walk(statement)
            if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == bound
        }
        for name in sorted(used & set(target.makers)):
            self.require(target, name, is_called, why)

    def find(self, file: SourceFile, dotted: str, level: int) -> SourceFile | None:
        """The local file that an import names, if it is one."""
        if level:
            folder = file.path.parent
            for _ in range(level - 1):
                folder = folder.parent
            roots = [folder]
        else:
            top = dotted.partition(".")[0]
            if top in sys.stdlib_module_names:
                return None
            roots = self.roots if is_installed(top) else [*self.roots, *self.far_roots]
        parts = dotted.split(".") if dotted else []
        for root in roots:
            stem = root.joinpath(*parts)
            for path in (stem.with_name(f"{stem.name}.py") if parts else None, stem / "__init__.py"):
                if path is not None and path.is_file():
                    return self.open(path, dotted or stem.name)
        return None

    def require_from_star(self, file: SourceFile, name: str, is_called: bool, why: list[str]) -> None:
        """Look a name up in what `from x import *` brings."""
        for index, statement in enumerate(file.body):
            if is_star(statement):
                assert isinstance(statement, ast.ImportFrom)
                target = self.find(file, statement.module or "", statement.level)
                if target is None:
                    file.kept[index] = {"*"}
                elif name in target.makers or any(map(is_star, target.body)):
                    file.kept[index] = {"*"}
                    file.stars.setdefault(statement, (target, set()))[1].add(name)
                    self.require(target, name, is_called, why)

    def try_to_require(self, file: SourceFile, name: str, what: str) -> None:
        """The same for a name that nothing may need: without what it cannot have, and with a note of that."""
        try:
            self.require(file, name, False, [])
        except ValueError as error:
            self.notes.append(f"{what} is left as it is, and will not run: {error}")

    def keep_uncalled_methods_running(self) -> None:
        """Take along what methods that neither constructor nor forward calls need, where that is only declared."""
        for file in list(self.files.values()):
            for index in sorted(file.kept):
                statement = file.body[index]
                if isinstance(statement, ast.ClassDef):
                    for name in sorted(needed_by(statement)):
                        if name in file.makers and self.is_harmless(file, name, set()):
                            self.require(file, name, False, [])
                        elif name in file.makers and not set(file.makers[name]) & set(file.kept):
                            line = file.body[file.makers[name][0]].lineno
                            self.notes.append(
                                f"{statement.name}: a method that neither the constructor nor the forward pass calls "
                                f"uses `{name}` (line {line}), which stays behind"
                            )

    def only_defines(self) -> bool:
        """Whether importing the file as a whole runs nothing but definitions, and needs only what is installed."""
        file = self.main
        return all(
            index in file.kept
            or (all(self.is_harmless(file, name, set()) for name in made_by(statement)) and only_declares(statement))
            for index, statement in enumerate(file.body)
        )

    def is_harmless(self, file: SourceFile, name: str, seen: set[str]) -> bool:
        """Whether a name is made by definitions, imports of what is there, and values without calls alone."""
        if name in seen or name not in file.makers:
            return True
        seen.add(name)
        for index in file.makers[name]:
            statement = file.body[index]
            if isinstance(statement, ast.Import | ast.ImportFrom):
                if not self.is_there(file, statement):
                    return False
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                if any(isinstance(each, ast.Call) for each in ast.walk(statement)):
                    return False
            elif not isinstance(statement, DEFINITIONS):
                return False
            if not isinstance(statement, ast.Import | ast.ImportFrom):
                if not all(self.is_harmless(file, each, seen) for each in needed_by(statement)):
                    return False
        return True

    def is_there(self, file: SourceFile, statement: ast.Import | ast.ImportFrom) -> bool:
        if isinstance(statement, ast.ImportFrom):
            target = self.find(file, statement.module or "", statement.level)
            if target is not None:
                return all(self.is_harmless(target, alias.name, set()) for alias in statement.names)
            return statement.level == 0 and is_installed((statement.module or "").partition(".")[0])
        return all(is_installed(alias.name.partition(".")[0]) for alias in statement.names)

    def write(self, folder: Path) -> dict[str, SourceFile]:
        """Write what is needed into a folder; name of the file -> where it is from."""
        written = {}
        for file in self.files.values():
            if not any(not is_future(file.body[index]) for index in file.kept):
                continue
            imports = {node: found for node, found in file.imports.items()}
            edits = Edits(file.kept, file.constants, imports, file.stars)
            (folder / f"{file.stem}.py").write_text(render(file.text, file.body, edits), encoding="utf-8")
            written[f"{file.stem}.py"] = file
        return written


def is_star(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*"


def is_future(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and statement.module == "__future__"


def is_installed(top: str) -> bool:
    """Whether Python finds a package of this name."""
    try:
        return find_spec(top) is not None
    except (ImportError, ValueError):
        return False
