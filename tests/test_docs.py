"""The pages hold together: links, tests they name, decisions, words, and what they may not say."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from sdxl_distill import errors

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
DECISIONS = sorted(ROOT.glob("docs/decisions/*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`]*`", re.S)
TEST = re.compile(r"(tests/[\w/]+\.py)::(test_\w+)")


def texts(*folders: str) -> list[Path]:
    """Return the text files of some folders; hidden and generated ones are nobody's text."""
    suffixes = {".py", ".md", ".json", ".yaml", ".sbatch", ".svg", ".toml", ".txt"}
    return [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in suffixes
        and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]


every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchor(heading: str) -> str:
    """Return a heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@cache
def anchors(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}


@every_page
def test_links_lead_somewhere(page):
    for link in LINK.findall(CODE.sub("", page.read_text("utf-8"))):
        if link.startswith(("http://", "https://")):
            continue
        place, _, heading = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        if heading:
            assert heading in anchors(target), link


@every_page
def test_tests_that_a_page_names_exist(page):
    for place, name in TEST.findall(page.read_text("utf-8")):
        assert f"def {name}(" in (ROOT / place).read_text("utf-8"), f"{place}::{name}"


def test_pages_that_the_code_refers_to_exist():
    sources = texts("sdxl_distill", "tests", "tools", "launch", "configs")
    for source in sources:
        for link in re.findall(r"docs/[\w/-]+\.(?:md|svg|png)", source.read_text("utf-8")):
            assert (ROOT / link).exists(), f"{source}: {link}"


def test_sections_that_docstrings_name_exist():
    named = {
        heading
        for path in (ROOT / "sdxl_distill").rglob("*.py")
        for heading in re.findall(r'docs/determinism\.md,\s+"([\w ]+)"', path.read_text("utf-8"))
    }
    assert named
    assert {anchor(heading) for heading in named} <= anchors(ROOT / "docs/determinism.md")


def test_sections_of_the_readme_that_the_code_names_exist():
    for path in (ROOT / "sdxl_distill").rglob("*.py"):
        for heading in re.findall(r'README\.md, "([^"]+)"', path.read_text("utf-8")):
            assert anchor(heading) in anchors(ROOT / "README.md"), f"{path}: {heading}"


def test_decisions_are_numbered_without_a_gap():
    numbers = [int(page.name[:4]) for page in DECISIONS]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.name)
def test_a_decision_has_its_four_parts(page):
    text = page.read_text("utf-8")
    assert text.startswith(f"# {page.name[:4]} ")
    parts = re.findall(r"^\*\*(\w+)\.\*\*", text, re.M)
    assert parts == ["Context", "Decision", "Rejected", "Consequences"]


def test_every_error_has_its_row_in_the_architecture():
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    for kind in errors.DistillError.__subclasses__():
        if kind.__module__ == errors.__name__:
            assert re.search(rf"^\| {kind.exit_code} \| `{kind.__name__}` \|", text, re.M), kind


def test_modules_that_the_architecture_names_exist():
    text = (ROOT / "docs/architecture.md").read_text("utf-8").partition("## Modules")[2]
    named = re.findall(r"`([\w/]+\.py)`", text)
    assert [name for name in named if not (ROOT / "sdxl_distill" / name).exists()] == []


def test_the_glossary_explains_a_word_once():
    text = (ROOT / "docs/glossary.md").read_text("utf-8")
    words = [
        word.strip()
        for entry in re.findall(r"(?:^|\. )\*\*([^*]+)\*\*(?=[:, ])", text, re.M)
        for word in entry.split(",")
    ]
    assert len(words) == len(set(words))
    assert {"teacher", "student", "draw", "shard", "index", "manifest", "lane", "claim"} <= {*words}


def test_every_golden_file_has_the_script_that_builds_it():
    golden = ROOT / "tests/golden"
    scripts = {path.stem for path in golden.glob("*.py")} - {"regenerate"}
    assert {path.stem for path in golden.glob("*.json")} == scripts
    page = (ROOT / "docs/determinism.md").read_text("utf-8")
    assert [name for name in scripts if f"| `{name}` |" not in page] == []


def test_no_file_speaks_of_one_machine():
    place = re.compile(r"(?<![\w.])/(?:root|work|home/\w+)/")
    files = texts("docs", "sdxl_distill", "tests", "tools", "benchmarks", "launch", "configs")
    files += [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml", ".txt", ".py"}]
    files += [ROOT / "Makefile", ROOT / ".ci/run"]
    found = [
        path.relative_to(ROOT).as_posix()
        for path in files
        if path != Path(__file__) and place.search(path.read_text("utf-8", errors="replace"))
    ]
    assert found == []
