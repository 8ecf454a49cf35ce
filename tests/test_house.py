"""Rules of the house that only running code shows; `tests/house/rules.py` holds the others."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.config.loader import load_config

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "numpy", "diffusers", "transformers", "pydantic", "tqdm"}


@pytest.mark.parametrize("module", ["sdxl_distill", "sdxl_distill.cli.main"])
def test_importing_the_package_or_its_commands_imports_nothing_heavy(module):
    program = f"import sys, {module}; print(*sys.modules)"
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert not HEAVY & set(output.split())


def test_the_constraints_are_what_is_installed():
    other = []
    for pin in re.findall(r"^[^#\n]+", (ROOT / "constraints.txt").read_text("utf-8"), re.M):
        requirement = Requirement(pin)
        if requirement.marker is None or requirement.marker.evaluate():
            installed = version(requirement.name)
            if Version(installed).public not in requirement.specifier:
                other.append(f"{pin}: {installed}")
    assert other == []


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(ROOT.glob("configs/*.json")) if ".schema." not in path.name],
    ids=lambda path: path.name,
)
def test_every_configuration_file_loads(path):
    load_config(path, DistillConfig if "distill" in path.name else BuilderConfig)
