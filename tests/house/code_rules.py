"""Rules of Python files: sizes, docstrings, comments, names, purity.

Each takes the work tree and yields what breaks it; `rules.py` runs them all.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from figures import FRAGMENT, MAX_FUNCTION_LINES
from source import Function, Source, length
from work_tree import ARCHITECTURE, Violation, WorkTree

MAX_FILE_LINES = 400
MAX_DOCSTRING_LINES = 6
MIN_COMMENTED_LINES = 30
PURE_IMPORTS = {
    *("__future__", "bisect", "collections", "dataclasses", "enum", "functools", "hashlib"),
    *("itertools", "json", "math", "numpy", "re", "sdxl_distill", "struct", "torch", "typing"),
}
BANNED_WORDS = {
    *("common", "handle", "helper", "helpers", "info", "item", "items"),
    *("manager", "misc", "util", "utils"),
}
# The rooms that work on sets, which may lie in an object store one day.
SET_ROOMS = {"builder", "loose", "sets", "shards", "stream", "verify"}
_LOCAL_FILES = {"fcntl", "glob", "io", "mmap", "os", "shutil", "stat", "tarfile", "tempfile"}
_LOCAL_ATTRIBUTES = {"descriptor", "fileno", "iterdir", "preadv", "read_bytes", "write_bytes"}
# Drawings do not count: errors.py opens with its tree.
_DRAWN = re.compile("[├└│]")


def module_docstrings(tree: WorkTree) -> Iterator[Violation]:
    """Every module says in at most six lines what it owns."""
    for source in [*tree.package, *tree.scripts]:
        docstring = ast.get_docstring(source.tree) or ""
        written = [line for line in docstring.splitlines() if not _DRAWN.match(line)]
        if not written:
            yield Violation(source.path, 1, "a module without a docstring")
        elif len(written) > MAX_DOCSTRING_LINES:
            rule = f"a docstring of {len(written)} lines, at most {MAX_DOCSTRING_LINES}"
            yield Violation(source.path, 1, rule)


def file_lengths(tree: WorkTree) -> Iterator[Violation]:
    """Files have at most 400 lines."""
    for source in _every_source(tree):
        if source.num_lines > MAX_FILE_LINES:
            rule = f"a file of {source.num_lines} lines, at most {MAX_FILE_LINES}"
            yield Violation(source.path, MAX_FILE_LINES + 1, rule)


def function_lengths(tree: WorkTree) -> Iterator[Violation]:
    """Functions have at most 60 lines."""
    for source in _every_source(tree):
        for node in source.functions():
            if length(node) > MAX_FUNCTION_LINES:
                rule = f"`{node.name}` has {length(node)} lines, at most {MAX_FUNCTION_LINES}"
                yield Violation(source.path, node.lineno, rule)


def meaningless_words(tree: WorkTree) -> Iterator[Violation]:
    """Names of the package use no word that says nothing."""
    for source in tree.package:
        names = [(1, source.name.rpartition(".")[2])]
        names += [(node.lineno, node.name) for node in source.definitions()]
        for line, name in names:
            words = {word.lower() for word in re.findall("[A-Z]?[a-z]+", name)}
            if words & BANNED_WORDS or name == "data":
                yield Violation(source.path, line, f"`{name}` uses a word that says nothing")


def pure_imports(tree: WorkTree) -> Iterator[Violation]:
    """What core/ and order/ import, at any depth, is arithmetic: no files, ranks, clocks."""
    by_name = {f"sdxl_distill.{source.name}": source for source in tree.modules}
    waiting = [source for source in tree.modules if source.room in ("core", "order")]
    seen = {source.path for source in waiting}
    while waiting:
        source = waiting.pop()
        for line, name in source.foreign_imports():
            if name.partition(".")[0] not in PURE_IMPORTS:
                rule = f"imports `{name}`, and core/ or order/ is built on this module"
                yield Violation(source.path, line, rule)
            imported = by_name.get(name)
            if imported is not None and imported.path not in seen:
                seen.add(imported.path)
                waiting.append(imported)


def files_behind_the_door(tree: WorkTree) -> Iterator[Violation]:
    """A set's files are opened, read, linked and listed in storage/ only, whatever holds them."""
    for source in tree.modules:
        if source.room not in SET_ROOMS:
            continue
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names} & _LOCAL_FILES
            elif isinstance(node, ast.Attribute):
                names = {node.attr} & _LOCAL_ATTRIBUTES
            else:
                continue
            for name in sorted(names):
                rule = f"uses `{name}`, and files of sets are local in storage/ only"
                yield Violation(source.path, node.lineno, rule)


def shared_test_packages(tree: WorkTree) -> Iterator[Violation]:
    """What tests share, in support/, is the only package among them."""
    for source in tree.tests:
        if source.path.endswith("__init__.py") and not source.path.startswith("tests/support/"):
            yield Violation(source.path, 1, "a package among the tests other than support/")


def modules_in_the_architecture(tree: WorkTree) -> Iterator[Violation]:
    """Every module stands once in the list of docs/architecture.md, and no other does."""
    page = tree.page(ARCHITECTURE)
    start = page.text.find("\n## Modules")
    listed = [
        (line, found[1])
        for line, found in page.found(r"`([\w/]+\.py)`")
        if start != -1 and found.start() > start
    ]
    names = {source.path.partition("/")[2]: source.path for source in tree.modules}
    seen: set[str] = set()
    for line, name in listed:
        if name not in names:
            yield Violation(page.path, line, f"lists `{name}`, which is no module")
        elif name in seen:
            yield Violation(page.path, line, f"lists `{name}` twice")
        seen.add(name)
    for name in sorted(names.keys() - seen):
        yield Violation(names[name], 1, f"not listed in {ARCHITECTURE}, Modules")


def layers_in_the_architecture(tree: WorkTree) -> Iterator[Violation]:
    """docs/architecture.md draws the layers of pyproject.toml, and has a row for each package."""
    page = tree.page(ARCHITECTURE)
    contract = re.search(r"^layers = \[\n(.*?)^\]", tree.file("pyproject.toml"), re.M | re.S)
    layers = re.findall('"(.+)"', contract[1]) if contract else []
    figure = re.search(r"^```\n(.*?)^```", page.text, re.M | re.S)
    drawn = [line.partition("  ")[0] for line in figure[1].splitlines()] if figure else []
    if drawn != layers:
        line = page.line(figure.start()) if figure else 1
        yield Violation(page.path, line, "draws other layers than pyproject.toml has")
    rows = {found[1] for _, found in page.found(r"^\| .*\? \| `(\w+)` \|$")}
    for room in sorted({source.room for source in tree.modules if "." in source.name}):
        if room not in rows:
            yield Violation(page.path, 1, f"has no question that `{room}` answers")


def entries_that_are_phrases(tree: WorkTree) -> Iterator[Violation]:
    """An entry of Args or Attributes is a phrase: `name: the shard's name`, not `of the shard`."""
    for source in tree.package:
        for line, entry in source.docstring_entries():
            if FRAGMENT.match(entry):
                yield Violation(source.path, line, f"an entry that is no phrase: {entry}")


def step_comments(tree: WorkTree) -> Iterator[Violation]:
    """A public function of 30 lines, its docstring apart, has comments that name its steps."""
    for source in tree.package:
        for node in source.public():
            if isinstance(node, ast.ClassDef) or _code_lines(node) < MIN_COMMENTED_LINES:
                continue
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            if not any(line in lines for line in source.comment_lines):
                rule = f"`{node.name}` has {_code_lines(node)} lines of code and no comment"
                yield Violation(source.path, node.lineno, rule)


def _code_lines(node: Function) -> int:
    docstring = node.body[0] if ast.get_docstring(node) is not None else None
    if docstring is None:
        return length(node)
    return length(node) - ((docstring.end_lineno or docstring.lineno) - docstring.lineno + 1)


def _every_source(tree: WorkTree) -> list[Source]:
    return [*tree.package, *tree.scripts, *tree.tests]
