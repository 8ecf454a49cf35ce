"""What pyproject.toml asks for is what is imported, and what `make test-lowest` runs with."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports], which pytest brings

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NEEDED = [Requirement(each) for each in PROJECT["dependencies"]]
FOR_THE_DEMO = [Requirement(each) for each in PROJECT["optional-dependencies"]["demo"]]
PINNED = re.findall(
    r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints-lowest.txt").read_text("utf-8"), re.M
)


def imported(folder: Path) -> set[str]:
    """Return the names of the packages that a folder's modules import, anywhere in them."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return names - {"sdxl_distill"} - sys.stdlib_module_names


@pytest.mark.parametrize("needed", NEEDED, ids=lambda each: each.name)
def test_the_lowest_environment_has_the_lowest_version_that_is_allowed(needed):
    [bound] = needed.specifier
    assert bound.operator == ">="
    pinned = [Version(number) for name, number in PINNED if name == needed.name]
    assert min(pinned) == Version(bound.version)


def test_everything_that_is_imported_is_asked_for():
    distributions = packages_distributions()
    found = {
        canonicalize_name(distribution)
        for name in imported(ROOT / "sdxl_distill")
        for distribution in distributions[name]
    }
    of_others = {"pydantic-core"}  # one with pydantic, which asks for exactly one version of it
    asked = {canonicalize_name(each.name) for each in [*NEEDED, *FOR_THE_DEMO]}
    assert found - of_others - asked == set()
