"""The example files as trees to be spoilt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BUILDER = {
    "teacher": {"checkpoint_path": "teacher", "teacher_id": "teacher_v1"},
    "data": {"image_dir": "images"},
}
DISTILL = {
    "run": {"name": "first"},
    "student": {"checkpoint_path": "base"},
    "teachers": [{"teacher_id": "one", "weight": 0.5}, {"teacher_id": "two", "weight": 0.5}],
}

WriteConfig = Callable[[Any], Path]


@pytest.fixture
def write_config(tmp_path: Path) -> WriteConfig:
    """Write text as it stands, or a tree as JSON, and return the file."""

    def write(content: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        return path

    return write


@pytest.fixture
def builder_file(write_config: WriteConfig) -> Path:
    """The smallest legal file of a builder."""
    return write_config(BUILDER)


@pytest.fixture
def distill_file(write_config: WriteConfig) -> Path:
    """The smallest legal file of the trainer, with two teachers."""
    return write_config(DISTILL)
