"""Checkpoint folders of their own for tests that damage them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from sdxl_distill.demo.family import Family


@pytest.fixture
def folder(tiny_family: Family, tmp_path: Path) -> Path:
    """A copy of the tiny base checkpoint, to be changed at will."""
    return shutil.copytree(tiny_family.base, tmp_path / "checkpoint")
