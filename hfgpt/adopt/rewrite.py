"""A Python file with some of its statements, and with other imports; the rest stays as its author wrote it."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Edits:
    """What stays of a file, and what changes.

    Attributes:
        kept: index of a statement -> the names that are needed of it.
        constants: name -> the value that it is given.
        imports: import -> (alias, file that it comes from, whether the file itself is meant), where that is local.
        stars: `from x import *` of a local file -> that file, and the names needed of it.
    """

    kept: Mapping[int, set[str]]
    constants: Mapping[str, object]
    imports: Mapping[ast.stmt, list[tuple[ast.alias, Any, bool]]]
    stars: Mapping[ast.stmt, tuple[Any, set[str]]]


def render(text: str, body: list[ast.stmt], edits: Edits) -> str:
    """The text of the statements that stay, each with the comments above it, after the head of the file."""
    lines = text.splitlines()
    whole = ast.parse(text).body
    ends = sorted({each.end_lineno or each.lineno for each in whole})
    pieces = [head_of(lines, whole)]
    for index in sorted(edits.kept):
        statement = body[index]
        first = min([statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", []))])
        shares_line = any(
            each is not statement and (each.lineno <= (statement.end_lineno or 0) and (each.end_lineno or 0) >= first)
            for each in body
        )
        before = max((end for end in ends if end < first), default=0)
        comments = lines[before : first - 1] if before else []
        pieces.append("\n".join([*trailing_comments(comments), render_one(text, statement, edits, index, shares_line)]))
    return "\n".join(piece for piece in pieces if piece) + "\n"


def head_of(lines: list[str], body: list[ast.stmt]) -> str:
    """What stands above the first statement, such as a licence, and the docstring."""
    first = body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    end = (first.end_lineno or 1) if is_docstring else min(
        [first.lineno, *(each.lineno for each in getattr(first, "decorator_list", []))]
    ) - 1  # fmt: skip
    return "\n".join(lines[:end]).strip("\n")


def trailing_comments(lines: list[str]) -> list[str]:
    """Blank lines and comments right above a statement."""
    start = len(lines)
    while start and (not lines[start - 1].strip() or lines[start - 1].startswith("#")):
        start -= 1
    return lines[start:]


def render_one(text: str, statement: ast.stmt, edits: Edits, index: int, shares_line: bool) -> str:
    """One statement."""
    constants = [name for name in edits.kept[index] if name in edits.constants]
    if constants:
        return "\n".join(
            f"{name} = {edits.constants[name]!r}  # the value given to `hfgpt adopt`" for name in constants
        )
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return "\n".join(rewritten(statement, edits, edits.kept[index]))
    first = min([statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", []))])
    if shares_line:
        return ast.unparse(statement)
    lines = [line.encode() for line in text.splitlines()[first - 1 : statement.end_lineno]]
    inner = [node for node in ast.walk(statement) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in sorted(inner, key=lambda each: (each.lineno, each.col_offset), reverse=True):
        if node not in edits.imports and node not in edits.stars:
            continue
        start, end = node.lineno - first, (node.end_lineno or node.lineno) - first
        indent = b" " * node.col_offset
        new = ("\n" + indent.decode()).join(rewritten(node, edits, None)).encode()
        lines[start : end + 1] = [lines[start][: node.col_offset] + new + lines[end][node.end_col_offset :]]
    return b"\n".join(lines).decode()


def rewritten(node: ast.Import | ast.ImportFrom, edits: Edits, needed: set[str] | None) -> list[str]:
    """The lines in the place of an import: of local files as they lie side by side, of all else only what is needed."""
    if node in edits.stars:
        file, names = edits.stars[node]
        return [f"from .{file.stem} import {', '.join(sorted(names))}"]
    local = edits.imports.get(node, [])
    lines = []
    for alias, file, is_module in local:
        renamed = f" as {alias.asname}" if alias.asname else ""
        if not is_module:
            lines.append(f"from .{file.stem} import {alias.name}{renamed}")
            continue
        name = alias.asname or alias.name
        # transformers (5.24) follows the first form only, so that the file is copied; the second gives it its name.
        lines.append(f"from .{file.stem} import __doc__ as _")
        lines.append(f"from . import {file.stem}" + ("" if name == file.stem else f" as {name}"))
    others = [
        alias
        for alias in node.names
        if all(alias is not each for each, _, _ in local)
        and (
            needed is None
            or alias.name == "*"
            or (alias.asname or alias.name) in needed
            or (alias.asname is None and isinstance(node, ast.Import) and alias.name.partition(".")[0] in needed)
        )
    ]
    if others:
        copy = (
            ast.Import(others)
            if isinstance(node, ast.Import)
            else ast.ImportFrom(module=node.module, names=others, level=node.level)
        )
        lines.append(ast.unparse(copy))
    return lines
