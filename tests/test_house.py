"""Rules of the house that no linter holds: sizes, docstrings, names, purity, pins, examples."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from sdxl_distill.config.loader import load_config
from sdxl_distill.config.schema import BuilderConfig, DistillConfig

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sdxl_distill"
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("benchmarks/*.py")])
SOURCES = [*MODULES, *SCRIPTS, *sorted(ROOT.glob("tests/**/*.py"))]

# What computes and never looks: no files, ranks, clocks, processes or global random state.
PURE_ROOTS = sorted([*PACKAGE.glob("core/*.py"), *PACKAGE.glob("order/*.py")])
PURE_IMPORTS = {
    *("__future__", "bisect", "collections", "dataclasses", "enum", "functools", "hashlib"),
    *("itertools", "json", "math", "numpy", "re", "struct", "torch", "typing"),
}
# Drawings do not count: errors.py opens with its tree.
DRAWN = re.compile("[├└│]")
HEAVY = {"torch", "numpy", "diffusers", "transformers", "pydantic", "tqdm"}
BANNED_WORDS = {
    *("common", "handle", "helper", "helpers", "info", "item", "items"),
    *("manager", "misc", "util", "utils"),
}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def _definitions(
    path: Path,
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def _with_own_imports(roots: list[Path]) -> list[Path]:
    """Return the modules and every module of the package that they import, at any depth."""
    found = dict.fromkeys(roots)
    queue = list(roots)
    while queue:
        for name in _imports(queue.pop()):
            path = ROOT / f"{name.replace('.', '/')}.py"
            if path.is_file() and path not in found:
                found[path] = None
                queue.append(path)
    return list(found)


every_module = pytest.mark.parametrize("path", MODULES, ids=_name)
every_source = pytest.mark.parametrize("path", SOURCES, ids=_name)


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=_name)
def test_every_module_says_in_at_most_six_lines_what_it_owns(path):
    docstring = ast.get_docstring(_tree(path))
    assert docstring, "no docstring"
    assert len([line for line in docstring.splitlines() if not DRAWN.match(line)]) <= 6


@every_source
def test_files_have_at_most_400_lines(path):
    assert len(path.read_text("utf-8").splitlines()) <= 400


@every_source
def test_functions_have_at_most_60_lines(path):
    lengths = {
        node.name: (node.end_lineno or node.lineno) - node.lineno + 1
        for node in _definitions(path)
        if not isinstance(node, ast.ClassDef)
    }
    assert {name: length for name, length in lengths.items() if length > 60} == {}


@every_module
def test_names_use_no_word_that_says_nothing(path):
    names = [path.stem, *(node.name for node in _definitions(path))]
    words = {word for name in names for word in re.findall("[A-Z]?[a-z]+", name)}
    assert {word.lower() for word in words} & BANNED_WORDS == set()
    assert "data" not in names


def test_every_module_is_named_in_the_architecture():
    names = [path.relative_to(PACKAGE).as_posix() for path in MODULES if path.stem != "__init__"]
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    assert [name for name in names if name not in text] == []


@pytest.mark.parametrize("path", _with_own_imports(PURE_ROOTS), ids=_name)
def test_pure_modules_import_only_arithmetic(path):
    foreign = {name.partition(".")[0] for name in _imports(path)} - {"sdxl_distill"}
    assert foreign <= PURE_IMPORTS


@pytest.mark.parametrize("module", ["sdxl_distill", "sdxl_distill.cli.main"])
def test_importing_the_package_or_its_commands_imports_nothing_heavy(module):
    program = f"import sys, {module}; print(*sys.modules)"
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert not HEAVY & set(output.split())


def test_what_tests_share_is_the_only_package_among_them():
    packages = [path.parent for path in (ROOT / "tests").rglob("__init__.py")]
    assert [path for path in packages if "support" not in path.parts] == []


@pytest.mark.parametrize(
    "pin", re.findall(r"^[^#\n]+", (ROOT / "constraints.txt").read_text(), re.M)
)
def test_the_constraints_are_what_is_installed(pin):
    requirement = Requirement(pin)
    if requirement.marker is None or requirement.marker.evaluate():
        assert Version(version(requirement.name)).public in requirement.specifier


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.json")), ids=_name)
def test_every_configuration_file_loads(path):
    if not path.name.endswith(".schema.json"):
        load_config(path, DistillConfig if "distill" in path.name else BuilderConfig)
