"""Which names a statement of a Python file makes, and which it needs; read, never run."""

import ast
import copy
import symtable
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def made_by(statement: ast.stmt) -> set[str]:
    """The names of the module that a statement makes, changes or adds something to."""
    if isinstance(statement, DEFINITIONS):
        return {statement.name}
    if isinstance(statement, ast.Expr):
        return changed_by(statement.value)
    names = set()
    for node in outside_definitions(statement):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, DEFINITIONS):
            names.add(node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            names |= root_of(node)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
    return names


def changed_by(call: ast.expr) -> set[str]:
    """The names that `x.update(...)` or `setattr(x, ...)` changes."""
    if not isinstance(call, ast.Call):
        return set()
    if isinstance(call.func, ast.Name):
        return root_of(call.args[0]) if call.func.id in ("setattr", "delattr") and call.args else set()
    return root_of(call.func)


def root_of(node: ast.AST) -> set[str]:
    """`x` of `x.a[0].b`."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return {node.id} if isinstance(node, ast.Name) else set()


def outside_definitions(statement: ast.AST) -> Iterator[ast.AST]:
    """A statement and what is in it, without the insides of functions and classes, which make no names of the file."""
    yield statement
    if isinstance(statement, (*DEFINITIONS, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        return
    for child in ast.iter_child_nodes(statement):
        yield from outside_definitions(child)


def only_declares(statement: ast.stmt) -> bool:
    """Whether a statement only makes names: no loop, no file opened by `with`, no call for its effect."""
    if isinstance(statement, (*LOOPS, ast.Raise, ast.Assert)):
        return False
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    if isinstance(statement, ast.If | ast.Try):
        return all(only_declares(each) for each in ast.iter_child_nodes(statement) if isinstance(each, ast.stmt)) and (
            not isinstance(statement, ast.Try)
            or all(only_declares(each) for handler in statement.handlers for each in handler.body)
        )
    return True


def is_main_guard(statement: ast.stmt) -> bool:
    """Whether it is `if __name__ == "__main__":`."""
    return isinstance(statement, ast.If) and "__name__" in {
        node.id for node in ast.walk(statement.test) if isinstance(node, ast.Name)
    }


def needed_by(node: ast.stmt) -> set[str]:
    """The names of the module that a statement refers to, at once or when it is called; local variables are none."""
    return needs_of(symtable.symtable(ast.unparse(node), "<adopt>", "exec"))


def needs_of(table: symtable.SymbolTable) -> set[str]:
    is_module = table.get_type() == "module"
    names = {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (is_module or symbol.is_global())
    }
    return names.union(*(needs_of(child) for child in table.get_children()))


def mentioned_in(node: ast.AST) -> set[str]:
    """Names of attributes, and texts that may be one for `getattr`."""
    attributes = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
    return attributes | {
        each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)
    }


def unread(values: Mapping[str, Any], trees: Iterable[ast.AST]) -> list[str]:
    """The names of these values, those within them after a dot, that stand nowhere in the code.

    One that does may still not be read; one that does not cannot be: no attribute, text, parameter, keyword or variable
    has that name.
    """
    nodes = [node for tree in trees for node in ast.walk(tree)]
    known = {getattr(node, field, None) for node in nodes for field in ("attr", "id", "arg")}
    known |= {node.value for node in nodes if isinstance(node, ast.Constant)}

    def walk(values: Mapping[str, Any], before: str) -> Iterator[str]:
        for name, value in values.items():
            if name not in known:
                yield before + name
            elif isinstance(value, Mapping):
                yield from walk(value, f"{before}{name}.")

    return list(walk(values, ""))


def without_methods(definition: ast.ClassDef, kept: set[str]) -> ast.ClassDef:
    """The class with empty bodies of the methods that are not kept; decorators and defaults of all stay."""
    definition = copy.deepcopy(definition)
    for each in definition.body:
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) and each.name not in kept:
            each.body = [ast.Pass()]
    return ast.fix_missing_locations(definition)


def is_special(name: str) -> bool:
    """Whether Python or `nn.Module` calls a method of this name by itself."""
    return (name.startswith("__") and name.endswith("__")) or name == "forward"
