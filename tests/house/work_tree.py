"""The repository's files as the rules of the house read them, and what a rule finds in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from source import PACKAGE, Source

ARCHITECTURE = "docs/architecture.md"
_BLOCK = re.compile(r"^ *```.*?^ *```", re.M | re.S)
_SPAN = re.compile(r"`[^`]*`", re.S)
_TEXT_SUFFIXES = {".py", ".md", ".json", ".yaml", ".sbatch", ".svg", ".toml", ".txt"}


@dataclass(frozen=True, order=True)
class Violation:
    """A place where a rule is broken.

    Attributes:
        path: the file, below the root.
        line: the number of the line, from 1.
        rule: what is wrong there, in words.
    """

    path: str
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}"


@dataclass(frozen=True)
class Text:
    """A file of text: a page, or one that is only searched."""

    path: str
    text: str

    def line(self, offset: int) -> int:
        """Return the number of the line in which a character stands."""
        return self.text.count("\n", 0, offset) + 1

    def found(self, pattern: str) -> Iterator[tuple[int, re.Match[str]]]:
        """Yield line and match wherever a pattern occurs."""
        for match in re.finditer(pattern, self.text, re.M):
            yield self.line(match.start()), match

    @cached_property
    def without_blocks(self) -> Text:
        """The page with its blocks of code blank; the lines keep their numbers."""
        return Text(self.path, _BLOCK.sub(_blank, self.text))

    @cached_property
    def prose(self) -> Text:
        """The page with all code blank, in blocks and between backticks."""
        return Text(self.path, _SPAN.sub(_blank, self.without_blocks.text))

    @cached_property
    def anchors(self) -> set[str]:
        """The anchors of its headings."""
        return {anchor(found[1]) for _, found in self.without_blocks.found(r"^#+ (.*)$")}


@dataclass(frozen=True)
class WorkTree:
    """All files that rules look at.

    Attributes:
        root: the folder of the repository.
    """

    root: Path

    @cached_property
    def package(self) -> list[Source]:
        """The modules of the package, its `__init__.py` files included."""
        return self._sources(f"{PACKAGE}/**/*.py")

    @property
    def modules(self) -> list[Source]:
        """The modules of the package that have a name of their own."""
        return [source for source in self.package if not source.path.endswith("__init__.py")]

    @cached_property
    def scripts(self) -> list[Source]:
        """What a user or contributor runs as a file."""
        return self._sources("*.py", "tools/*.py", "benchmarks/*.py")

    @cached_property
    def tests(self) -> list[Source]:
        """The tests, and what they share."""
        return self._sources("tests/**/*.py")

    @cached_property
    def pages(self) -> list[Text]:
        """The pages that people read."""
        return [self.text(path) for path in self._paths("*.md", "docs/**/*.md")]

    def page(self, path: str) -> Text:
        """Return a page by its place; an empty one where there is none."""
        return next((page for page in self.pages if page.path == path), Text(path, ""))

    def file(self, path: str) -> str:
        """Return what a file says by its place, hidden or not; nothing where there is none."""
        place = self.root / path
        return place.read_text("utf-8") if place.is_file() else ""

    def texts(self, *patterns: str) -> list[Text]:
        """Return the text files below folders or of the given names; nothing hidden."""
        return [self.text(path) for path in self._paths(*patterns) if path.suffix in _TEXT_SUFFIXES]

    def text(self, path: Path) -> Text:
        """Read one file as text."""
        return Text(path.relative_to(self.root).as_posix(), path.read_text("utf-8", "replace"))

    def _sources(self, *patterns: str) -> list[Source]:
        return [
            Source(path.relative_to(self.root).as_posix(), path.read_text("utf-8"))
            for path in self._paths(*patterns)
        ]

    def _paths(self, *patterns: str) -> list[Path]:
        found = {path for pattern in patterns for path in self.root.glob(pattern)}
        return sorted(
            path
            for path in found
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(self.root).parts)
        )


def anchor(heading: str) -> str:
    """Return a heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _blank(code: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", code[0])
