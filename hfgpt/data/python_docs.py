"""Python's own documentation as text: real English that is on every machine with Python, for runs without network.

Two sources that ship with CPython: the language reference that `help()` shows (`pydoc_data.topics`, a dict of strings),
and the docstrings of the standard library. The library's files are parsed, never imported or run.
"""

import ast
import os
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

# Folders below the standard library that hold no part of it, and tests, whose docstrings are test data.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def documents() -> Iterator[str]:
    """Yield one document per help topic, then one per module of the standard library; about 2 million characters.

    The order is fixed. A paragraph of an earlier document is left out, and so is a document that has no other:
    help topics share whole sections, and modules their docstrings. The text depends on the Python version.
    """
    seen: set[str] = set()
    for text in chain(topics.values(), module_documents(Path(sysconfig.get_path("stdlib")))):
        paragraphs = [paragraph for paragraph in text.split("\n\n") if " ".join(paragraph.split()) not in seen]
        seen.update(" ".join(paragraph.split()) for paragraph in paragraphs)
        if text := "\n\n".join(paragraphs).strip("\n"):
            yield text


def module_documents(root: Path) -> Iterator[str]:
    """Yield the docstrings of each .py file below `root`, files in the order of their paths, tests left out."""
    for path in sorted(module_files(root), key=lambda path: path.relative_to(root).as_posix()):
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue  # Distributions keep templates and Python 2 samples among the modules. Bad encodings end here too.
        yield "\n\n".join(docstrings(tree))


def module_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def docstrings(node: ast.AST) -> Iterator[str]:
    """Yield the docstring of a module, class or function, and of all that it holds, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):  # Expressions hold no definitions, and are most of a tree.
            yield from docstrings(child)
