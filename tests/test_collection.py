"""No test sleeps: what is on disk is collected, and what the pages cite is among it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
CITED = re.compile(r"(tests/[\w/]+\.py)::(test_\w+)")
NAMED = re.compile(r"tests/[\w/]*test_\w+\.py")


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """Return `file::test` of everything that a plain `pytest` finds, without parameters."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return {line.partition("[")[0] for line in ended.stdout.splitlines() if "::" in line}


def test_every_test_file_on_disk_is_collected(collected):
    on_disk = {path.relative_to(ROOT).as_posix() for path in TESTS.rglob("test_*.py")}
    assert on_disk - {test.partition("::")[0] for test in collected} == set()


def test_every_test_that_a_page_cites_is_collected(collected):
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    cited = {"::".join(found) for found in CITED.findall(text)}
    assert cited
    assert cited - collected == set()
    assert set(NAMED.findall(text)) - {test.partition("::")[0] for test in collected} == set()


def test_no_name_on_the_way_to_a_test_is_one_that_pytest_leaves_out_by_default():
    # The tools of others keep such lists too: a folder named `build` is generated output to them.
    left_out = {"build", "dist", "venv", "node_modules", "CVS", "_darcs"}
    folders = {
        part for path in TESTS.rglob("test_*.py") for part in path.relative_to(ROOT).parent.parts
    }
    assert folders & left_out == set()
