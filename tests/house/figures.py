"""Figures of the package's own text: `make house` prints them, docs/architecture.md quotes them.

Everything is read from the sources by `ast` and `tokenize`; nothing of the package is imported.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
PACKAGE = "sdxl_distill"
MAX_FUNCTION_LINES = 60

QUESTIONS = {
    "where is the loss?": "core.loss",
    "what bytes are in a shard?": "shards.record",
    "what decides the order?": "order.stream_order",
}
"""Each question that a stranger asks first, and the module that answers it."""

FRAGMENT = re.compile(
    r"(?:of|that|which|who|whose|where|when|for|from|in|with|without|by|to|as|between) ", re.I
)
"""How an entry of Args begins that is no phrase: `name: of the shard.`"""

_ENTRY = re.compile(r"^ {4,}(\*{0,2}\w+): (.*)$")
_SECTION = re.compile(r"^ *(Args|Attributes):$")


@dataclass(frozen=True)
class Source:
    """One module of the package.

    Attributes:
        name: its dotted name below the package, as `core.loss`.
        text: its source.
    """

    name: str
    text: str

    @property
    def room(self) -> str:
        """The package it belongs to, or its own name at the top."""
        return self.name.partition(".")[0]

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax tree."""
        return ast.parse(self.text)

    @property
    def num_lines(self) -> int:
        """How many lines it has, blank ones included."""
        return len(self.text.splitlines())

    def imports(self) -> Iterator[str]:
        """Yield the modules of the package that it imports, late imports included."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                module = (node.module or "").removeprefix(PACKAGE).lstrip(".")
                yield from {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
                yield module

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Yield every function and method."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node

    def num_comment_lines(self) -> int:
        """Count comments that have a line of their own."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return sum(
            token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
            for token in tokens
        )

    def docstring_entries(self) -> Iterator[str]:
        """Yield the text of every entry below Args or Attributes, its first line."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from _entries(ast.get_docstring(node, clean=True) or "")


def sources() -> list[Source]:
    """Return every module of the package, sorted by name."""
    root = ROOT / PACKAGE
    return [
        Source(
            path.relative_to(root).with_suffix("").as_posix().replace("/", "."), path.read_text()
        )
        for path in sorted(root.rglob("*.py"))
    ]


def figures(modules: list[Source]) -> Iterator[tuple[str, str]]:
    """Yield what is measured and its value, in the order in which it is shown."""
    files = [module for module in modules if module.num_lines > 1]
    sizes = [module.num_lines for module in files]
    yield "files / lines", f"{len(files)} / {sum(sizes):,}"
    yield "file median / longest", f"{median(sizes):.0f} / {max(sizes)}"
    lengths = {
        f"{module.name}.{function.name}": (function.end_lineno or 0) - function.lineno + 1
        for module in files
        for function in module.functions()
    }
    longest = max(lengths, key=lambda name: lengths[name])
    num_long = sum(length > MAX_FUNCTION_LINES for length in lengths.values())
    yield f"functions over {MAX_FUNCTION_LINES} lines", str(num_long)
    yield "longest function", f"{lengths[longest]} lines, `{longest}`"
    yield "public definitions with a docstring", _percent(*_docstrings(files))
    yield "arguments annotated", _percent(*_annotations(files))
    comments = sum(module.num_comment_lines() for module in files)
    written = sum(bool(line.strip()) for module in files for line in module.text.splitlines())
    yield "comment lines among all that are not blank", _percent(comments, written)
    entries = [entry for module in files for entry in module.docstring_entries()]
    num_fragments = sum(bool(FRAGMENT.match(entry)) for entry in entries)
    yield "Args entries that are fragments", f"{num_fragments} of {len(entries)}"
    yield "imports inside a package / across packages", "{} / {}".format(*_crossings(modules))
    for question, answer in QUESTIONS.items():
        yield f"files to read: {question}", _path_to(modules, answer)


def rooms(modules: list[Source]) -> Iterator[tuple[str, int, int, int, int]]:
    """Yield each package with its files, lines, imports inside and imports from others."""
    names = {module.name: module.room for module in modules}
    inside: Counter[str] = Counter()
    across: Counter[str] = Counter()
    for module in modules:
        for name in set(module.imports()) & names.keys():
            (inside if names[name] == module.room else across)[module.room] += 1
    for room in sorted({module.room for module in modules if "." in module.name}):
        own = [module for module in modules if module.room == room and module.num_lines > 1]
        num_lines = sum(module.num_lines for module in own)
        yield room, len(own), num_lines, inside[room], across[room]


def _entries(docstring: str) -> Iterator[str]:
    in_section = False
    for line in docstring.splitlines():
        if _SECTION.match(line):
            in_section = True
        elif line and not line.startswith(" "):
            in_section = False
        elif in_section and (entry := _ENTRY.match(line)) and not line.startswith(" " * 8):
            yield entry[2]


def _docstrings(files: list[Source]) -> tuple[int, int]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [
        node
        for module in files
        for parent in ast.walk(module.tree)
        if isinstance(parent, ast.Module | ast.ClassDef) and not _is_private(parent)
        for node in parent.body
        if isinstance(node, kinds) and not node.name.startswith("_")
    ]
    return sum(ast.get_docstring(node) is not None for node in public), len(public)


def _is_private(node: ast.Module | ast.ClassDef) -> bool:
    return isinstance(node, ast.ClassDef) and node.name.startswith("_")


def _annotations(files: list[Source]) -> tuple[int, int]:
    arguments = [
        argument
        for module in files
        for function in module.functions()
        for argument in (
            *function.args.posonlyargs,
            *function.args.args,
            *function.args.kwonlyargs,
        )
        if argument.arg not in ("self", "cls")
    ]
    return sum(argument.annotation is not None for argument in arguments), len(arguments)


def _crossings(modules: list[Source]) -> tuple[int, int]:
    found = list(rooms(modules))
    return sum(row[3] for row in found), sum(row[4] for row in found)


def _path_to(modules: list[Source], answer: str) -> str:
    """Say how many files lie between a command and the answer, following imports."""
    by_name = {module.name: module for module in modules}
    if answer not in by_name:
        return f"no module {answer}"
    waiting = deque((name,) for name in by_name if name.startswith("cli."))
    seen = {path[0] for path in waiting}
    while waiting:
        path = waiting.popleft()
        if path[-1] == answer:
            return f"1 by name (`{answer}`), {len(path)} by imports: {' → '.join(path)}"
        for name in sorted(set(by_name[path[-1]].imports()) & by_name.keys() - seen):
            seen.add(name)
            waiting.append((*path, name))
    return f"1 by name (`{answer}`), not reached from a command"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%} ({part:,} of {whole:,})"


def main() -> None:
    """Print the figures, then the packages, as tables of Markdown."""
    modules = sources()
    print("| measured | here |\n|---|---|")
    for name, value in figures(modules):
        print(f"| {name} | {value} |")
    print("\n| package | files | lines | imports inside | imports of others |")
    print("|---|---:|---:|---:|---:|")
    for room, num_files, num_lines, inside, across in rooms(modules):
        print(f"| {room} | {num_files} | {num_lines:,} | {inside} | {across} |")


if __name__ == "__main__":
    main()
