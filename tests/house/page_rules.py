"""Rules of pages, and of what code says about pages: links, citations, decisions, glossary.

Each takes the work tree and yields what breaks it; `rules.py` runs them all.
"""

from __future__ import annotations

from collections.abc import Iterator

from work_tree import Text, Violation, WorkTree, anchor

DETERMINISM = "docs/determinism.md"
GLOSSARY = "docs/glossary.md"
PARTS_OF_A_DECISION = ["Context", "Decision", "Rejected", "Consequences"]
_LINK = r"\[[^\]]*\]\(([^)\s]+)\)"
_CITED_TEST = r"(tests/[\w/]+\.py)::(test_\w+)"
_CITED_PAGE = r"docs/[\w/-]+\.(?:md|svg|png)"
_WORD = r"(?:^|\. )\*\*([^*]+)\*\*(?=[:, ])"
_MACHINE = r"(?<![\w.])/(?:root|work|home/\w+)/"


def links(tree: WorkTree) -> Iterator[Violation]:
    """Every link leads to a file that is there, and to a heading in it."""
    pages = {page.path: page for page in tree.pages}
    for page in tree.pages:
        for line, found in page.prose.found(_LINK):
            place, _, heading = found[1].partition("#")
            if place.startswith(("http:", "https:")):
                continue
            target = (tree.root / page.path).parent / place if place else tree.root / page.path
            if not target.exists():
                yield Violation(page.path, line, f"a link to `{place}`, which is not there")
            elif heading:
                path = target.resolve().relative_to(tree.root.resolve()).as_posix()
                if path not in pages or heading not in pages[path].anchors:
                    yield Violation(page.path, line, f"a link to no heading, `{found[1]}`")


def cited_tests(tree: WorkTree) -> Iterator[Violation]:
    """Every test that a page cites is there."""
    texts = {source.path: source.text for source in tree.tests}
    for page in tree.pages:
        for line, found in page.found(_CITED_TEST):
            if f"def {found[2]}(" not in texts.get(found[1], ""):
                yield Violation(page.path, line, f"cites `{found[0]}`, which is no test")


def cited_pages(tree: WorkTree) -> Iterator[Violation]:
    """Every page or figure of docs/ that other files name is there."""
    folders = ("sdxl_distill", "tests", "tools", "launch", "configs", "benchmarks")
    for text in tree.texts("*.py", *(f"{folder}/**/*" for folder in folders)):
        if text.path.startswith("tests/house/test_"):
            continue  # names such pages on purpose
        for line, found in text.found(_CITED_PAGE):
            if not (tree.root / found[0]).exists():
                yield Violation(text.path, line, f"names `{found[0]}`, which is not there")


def cited_sections(tree: WorkTree) -> Iterator[Violation]:
    """Every section of a page that code names is there: `docs/determinism.md, "Lanes"`."""
    for source in tree.package:
        for line, found in Text(source.path, source.text).found(r'([\w/]+\.md),\s+"([^"]+)"'):
            if anchor(found[2]) not in tree.page(found[1]).anchors:
                yield Violation(source.path, line, f'{found[1]} has no section "{found[2]}"')


def decisions(tree: WorkTree) -> Iterator[Violation]:
    """Decisions are numbered without a gap, and each has its four parts."""
    pages = [page for page in tree.pages if page.path.startswith("docs/decisions/")]
    for number, page in enumerate(pages, start=1):
        if not page.text.startswith(f"# {number:04} ") or f"/{number:04}-" not in page.path:
            yield Violation(page.path, 1, f"is not number {number:04}, in its name and heading")
        parts = [found[1] for _, found in page.found(r"^\*\*(\w+)\.\*\*")]
        if parts != PARTS_OF_A_DECISION:
            yield Violation(page.path, 1, f"lacks the parts {', '.join(PARTS_OF_A_DECISION)}")


def glossary(tree: WorkTree) -> Iterator[Violation]:
    """The glossary explains a word once."""
    page = tree.page(GLOSSARY)
    seen: set[str] = set()
    for line, found in page.found(_WORD):
        for word in (word.strip() for word in found[1].split(",")):
            if word in seen:
                yield Violation(page.path, line, f'explains "{word}" twice')
            seen.add(word)


def golden_files(tree: WorkTree) -> Iterator[Violation]:
    """A golden file has the script that builds it, and a row in docs/determinism.md."""
    golden = tree.root / "tests/golden"
    scripts = {path.stem for path in golden.glob("*.py")} - {"regenerate"}
    stored = {path.stem for path in golden.glob("*.json")}
    for name in sorted(scripts ^ stored):
        yield Violation(f"tests/golden/{name}", 1, "a golden file or its script, without the other")
    for name in sorted(scripts):
        if f"| `{name}` |" not in tree.page(DETERMINISM).text:
            yield Violation(f"tests/golden/{name}.py", 1, f"has no row in {DETERMINISM}")


def one_machine(tree: WorkTree) -> Iterator[Violation]:
    """No file speaks of one machine's folders."""
    folders = ("docs", "sdxl_distill", "tests", "tools", "benchmarks", "launch", "configs")
    texts = tree.texts("*.*", *(f"{folder}/**/*" for folder in folders))
    others = [Text(path, tree.file(path)) for path in ("Makefile", ".ci/run")]
    for text in [*texts, *others]:
        for line, found in text.found(_MACHINE):
            yield Violation(text.path, line, f"names a folder of one machine, {found[0]}")
