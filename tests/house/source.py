"""One Python file of the repository, as `ast` and `tokenize` see it; nothing of it is imported."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

PACKAGE = "sdxl_distill"
Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
Definition: TypeAlias = Function | ast.ClassDef

_ENTRY = re.compile(r"^ {4,}(\*{0,2}\w+): (.*)$")
_SECTION = re.compile(r"^ *(Args|Attributes):$")


@dataclass(frozen=True)
class Source:
    """One Python file.

    Attributes:
        path: its place below the root, as `sdxl_distill/core/loss.py`.
        text: what it says.
    """

    path: str
    text: str

    @property
    def name(self) -> str:
        """The dotted name of a module below the package, as `core.loss`."""
        return self.path.removeprefix(f"{PACKAGE}/").removesuffix(".py").replace("/", ".")

    @property
    def room(self) -> str:
        """The package it belongs to, or its own name at the top."""
        return self.name.partition(".")[0]

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax tree."""
        return ast.parse(self.text)

    @cached_property
    def statements(self) -> list[ast.AST]:
        """Every statement, at any depth; expressions are left out, which is five times as fast."""
        found: list[ast.AST] = [self.tree]
        for node in found:
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                inner = getattr(node, field, None)
                if isinstance(inner, list):
                    found.extend(inner)
        return found

    @property
    def num_lines(self) -> int:
        """How many lines it has, blank ones included."""
        return len(self.text.splitlines())

    @cached_property
    def comment_lines(self) -> list[int]:
        """The numbers of the lines that are comments and nothing else, ascending."""
        return [
            token.start[0]
            for token in tokenize.generate_tokens(io.StringIO(self.text).readline)
            if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
        ]

    def definitions(self) -> Iterator[Definition]:
        """Yield every class, function and method."""
        for node in self.statements:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield node

    def functions(self) -> Iterator[Function]:
        """Yield every function and method."""
        for node in self.definitions():
            if not isinstance(node, ast.ClassDef):
                yield node

    def public(self) -> Iterator[Definition]:
        """Yield the public definitions: of the module, and of its public classes."""
        for parent in self.statements:
            if isinstance(parent, ast.Module) or (
                isinstance(parent, ast.ClassDef) and not parent.name.startswith("_")
            ):
                for node in parent.body:
                    is_named = isinstance(
                        node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
                    )
                    if is_named and not node.name.startswith("_"):
                        yield node

    def foreign_imports(self) -> Iterator[tuple[int, str]]:
        """Yield the line and the name of every module that it imports, its own package's too."""
        for node in self.statements:
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.lineno, node.module or ""

    def imports(self) -> Iterator[str]:
        """Yield the modules of the package that it imports, late imports included."""
        for node in self.statements:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                module = (node.module or "").removeprefix(PACKAGE).lstrip(".")
                yield from {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
                yield module

    def docstring_entries(self) -> Iterator[tuple[int, str]]:
        """Yield line and text, its first line, of every entry below Args or Attributes."""
        for node in self.definitions():
            docstring = ast.get_docstring(node)
            if docstring is not None:
                first = node.body[0].lineno
                yield from ((first + at, entry) for at, entry in _entries(docstring))


def length(node: Definition) -> int:
    """Return how many lines a definition has, from `def` or `class` to its last one."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _entries(docstring: str) -> Iterator[tuple[int, str]]:
    in_section = False
    for at, line in enumerate(docstring.splitlines()):
        if _SECTION.match(line):
            in_section = True
        elif line and not line.startswith(" "):
            in_section = False
        elif in_section and (entry := _ENTRY.match(line)) and not line.startswith(" " * 8):
            yield at, entry[2]
