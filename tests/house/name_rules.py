"""Names between backticks on the pages are names of the code: none outlives what it named.

What looks like a name is looked up: `Word`, `snake_case`, `a.b`, `folder/file.py`, `make target`,
`--option`. Names of other projects that no code of ours uses are listed here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from source import Definition, Source
from work_tree import Text, Violation, WorkTree

CONFIGURATION = "docs/configuration.md"
# Generated from the schema and from measurements, or a history of names that are gone.
EXEMPT = {"CHANGELOG.md", CONFIGURATION, "docs/performance.md"}
NAMES_OF_OTHERS = {
    *("LimitNOFILE", "MKL_CBWR"),  # of systemd and MKL
    *("save_state", "static_graph", "total_limit"),  # of accelerate and torch
    # Of the tools whose configuration files are known too, docs/running.md:
    *("distillation/build_latent_cache.py", "distillation/build_teacher_cache.py"),
    *("distillation/train_distill.py", "distillation/verify_cache.py"),
}

_HERE = "tests/house/name_rules.py"
_SPAN = r"`([^`]+)`"
_PATH = re.compile(r"(?<![\w./{}…~*-])[\w.-]+(?:/[\w.*-]+)+/?(?![\w{}…/])")
_FILE = re.compile(r"(?<![\w./{}…-])[\w-]+\.(?:json|jsonl|py|md|txt|toml|yaml|idx|tar)\b(?!/)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]+")
_TARGET = re.compile(r"\bmake ([a-z][\w-]*)")
_NAME = re.compile(r"(?<![\w.{<-])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*(?![\w}>-])")
_CAPITALISED = re.compile(r"[A-Z]\w*[a-z]")
# Texts of Python, with or without a prefix, and comments.
_STRING = re.compile(
    r'("""|\'\'\')(?:\\.|[^\\])*?\1|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|#[^\n]*', re.S
)


@dataclass(frozen=True)
class Vocabulary:
    """Every name that the work tree knows.

    Attributes:
        tree: the work tree.
    """

    tree: WorkTree

    @cached_property
    def words(self) -> set[str]:
        """Identifiers of the code, and the parts of texts without a space: keys, variables."""
        found: set[str] = set()
        for source in self.sources:
            found.update(re.findall(r"\w+", source.path))
            # The tests of these rules name what is not there, as texts.
            found.update(_words(source.text, with_texts=not source.path.startswith("tests/house/")))
        for text in self.tree.texts("configs/*", "launch/**/*", "pyproject.toml"):
            found.update(_words(re.sub(r"^\s*//.*", "", text.text, flags=re.M)))
        return found

    @cached_property
    def sources(self) -> list[Source]:
        """Every Python file, in benchmarks too."""
        return [*self.tree.package, *self.tree.scripts, *self.tree.tests]

    @cached_property
    def texts(self) -> str:
        """All code as one text, in which file names and options are looked for."""
        texts = self.tree.texts("launch/**/*", "pyproject.toml", "constraints*.txt")
        found = [source.text for source in self.sources if "/house/test_" not in source.path]
        return "\n".join([*found, *(text.text for text in texts), self.tree.file("Makefile")])

    @cached_property
    def members(self) -> dict[str, set[str]]:
        """What a class or module of the package defines; nothing for classes with other bases."""
        found: dict[str, set[str]] = {}
        for source in self.tree.package:
            found.setdefault(source.name.rpartition(".")[2], set()).update(
                _defined(source.tree.body)
            )
            for node in source.definitions():
                if isinstance(node, ast.ClassDef):
                    inherits = any(ast.unparse(base) in self._classes for base in node.bases)
                    names = _defined(node.body) | _set_by_methods(node)
                    found.setdefault(node.name, set()).update({"*"} if inherits else names)
        return found

    @cached_property
    def _classes(self) -> set[str]:
        return {
            node.name
            for source in self.tree.package
            for node in source.definitions()
            if isinstance(node, ast.ClassDef)
        }

    @cached_property
    def keys(self) -> set[str]:
        """The dotted paths of all keys of both configuration files, sections included."""
        section, found = "", set()
        for line in self.tree.page(CONFIGURATION).text.splitlines():
            if line.startswith("#"):
                named = re.search("`(.+)`", line)
                section = f"{named[1]}." if named else ""
                found.update(_beginnings(section[:-1]))
            elif key := re.match(r"\| `(\w+)` \|", line):
                found.add(section + key[1])
        return found - {""}

    def knows_path(self, path: str, page: Text) -> bool:
        """Is a path below the root, the package, the tests or the page's folder there?"""
        if not path.endswith((".py", ".md")) and path.partition("/")[0] not in self._folders:
            return True  # a place of the user's
        root = self.tree.root
        starts = [root, root / "sdxl_distill", root / "tests", (root / page.path).parent]
        return any(next(start.glob(path.rstrip("/")), None) for start in starts)

    @cached_property
    def _folders(self) -> set[str]:
        return {source.path.partition("/")[0] for source in self.sources} | {"configs", "launch"}

    def knows_name(self, name: str) -> bool:
        """Is an identifier, or a dotted one, of this code?"""
        first, *others = name.split(".")
        if others and any(key.partition(".")[0] == first for key in self.keys):
            return name in self.keys or others[0] in self.members.get(first, set())
        for owner, member in zip([first, *others], others, strict=False):
            known = self.members.get(owner, {"*"})
            if owner in self._classes and "*" not in known and member not in known:
                return False
        return all(part in self.words or self._is_affix(part) for part in (first, *others))

    def _is_affix(self, part: str) -> bool:
        """Is it the beginning or the end of names, as `num_` and `_bytes`?"""
        return (part.startswith("_") and any(word.endswith(part) for word in self.words)) or (
            part.endswith("_") and any(word.startswith(part) for word in self.words)
        )


def names_on_pages(tree: WorkTree) -> Iterator[Violation]:
    """Every name in backticks on a page exists."""
    vocabulary = Vocabulary(tree)
    used: set[str] = set()
    for page in tree.pages:
        if page.path in EXEMPT:
            continue
        for line, found in page.without_blocks.found(_SPAN):
            for name in _unknown(found[1], page, vocabulary):
                used.add(name)
                if name not in NAMES_OF_OTHERS:
                    yield Violation(page.path, line, f"`{name}` is nothing that the code knows")
    if (tree.root / _HERE).is_file():
        for name in sorted(NAMES_OF_OTHERS - used):
            yield Violation(_HERE, 1, f"`{name}` need not be listed here")


def _unknown(span: str, page: Text, vocabulary: Vocabulary) -> Iterator[str]:
    """Yield what looks like a name and is none."""
    if "::" in span:
        return  # a test: page_rules.cited_tests
    rest = span.replace("NAME", "…")  # any such file
    for pattern, is_known in (
        (_OPTION, lambda name: f'"{name}' in vocabulary.texts or f" {name}" in vocabulary.texts),
        (_PATH, lambda name: vocabulary.knows_path(name, page)),
        (_FILE, lambda name: name in vocabulary.texts or _is_file(name, vocabulary)),
    ):
        yield from (name for name in pattern.findall(rest) if not is_known(name))
        rest = pattern.sub(" ", rest)
    for target in _TARGET.findall(rest):
        if not re.search(rf"^{target}:", vocabulary.tree.file("Makefile"), re.M):
            yield f"make {target}"
    for name in _NAME.findall(rest):
        if _looks_like_a_name(name) and not vocabulary.knows_name(name):
            yield name


def _words(text: str, *, with_texts: bool = True) -> set[str]:
    """Return the identifiers of code, and those in its texts that have no space."""
    found = set(re.findall(r"[A-Za-z_]\w*", _STRING.sub(" ", text)))
    if with_texts:
        for quoted in _STRING.finditer(text):
            if not re.search(r"\s", quoted[0]):
                found.update(re.findall(r"[A-Za-z_]\w*", quoted[0]))
    return found


def _looks_like_a_name(name: str) -> bool:
    return len(name) > 2 and ("." in name or "_" in name or bool(_CAPITALISED.match(name)))


def _is_file(name: str, vocabulary: Vocabulary) -> bool:
    return next(vocabulary.tree.root.glob(name), None) is not None or any(
        source.path.endswith(f"/{name}") for source in vocabulary.sources
    )


def _defined(body: list[ast.stmt]) -> set[str]:
    """Return the names that the statements of a class or module bind."""
    found: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update(target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found.update(alias.asname or alias.name for alias in node.names)
    return found


def _set_by_methods(node: Definition) -> set[str]:
    return {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute)
        and isinstance(inner.value, ast.Name)
        and inner.value.id == "self"
    }


def _beginnings(path: str) -> Iterator[str]:
    parts = path.split(".")
    yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))
