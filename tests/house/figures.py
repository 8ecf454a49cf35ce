"""Figures of the package's own text: `make house` prints them, docs/architecture.md quotes them.

Everything is read from the sources by `ast` and `tokenize`; nothing of the package is imported.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from source import PACKAGE, Source, length

ROOT = Path(__file__).parents[2]
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


def sources() -> list[Source]:
    """Return every module of the package, sorted by name."""
    return [
        Source(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))
        for path in sorted((ROOT / PACKAGE).rglob("*.py"))
    ]


def figures(modules: list[Source]) -> Iterator[tuple[str, str]]:
    """Yield what is measured and its value, in the order in which it is shown."""
    files = [module for module in modules if module.num_lines > 1]
    sizes = [module.num_lines for module in files]
    yield "files / lines", f"{len(files)} / {sum(sizes):,}"
    yield "file median / longest", f"{median(sizes):.0f} / {max(sizes)}"
    lengths = {
        f"{module.name}.{function.name}": length(function)
        for module in files
        for function in module.functions()
    }
    longest = max(lengths, key=lambda name: lengths[name])
    num_long = sum(length > MAX_FUNCTION_LINES for length in lengths.values())
    yield f"functions over {MAX_FUNCTION_LINES} lines", str(num_long)
    yield "longest function", f"{lengths[longest]} lines, `{longest}`"
    yield "public definitions with a docstring", _percent(*_docstrings(files))
    yield "arguments annotated", _percent(*_annotations(files))
    comments = sum(len(module.comment_lines) for module in files)
    written = sum(bool(line.strip()) for module in files for line in module.text.splitlines())
    yield "comment lines among all that are not blank", _percent(comments, written)
    entries = [entry for module in files for _, entry in module.docstring_entries()]
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


def _docstrings(files: list[Source]) -> tuple[int, int]:
    public = [node for module in files for node in module.public()]
    return sum(ast.get_docstring(node) is not None for node in public), len(public)


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
