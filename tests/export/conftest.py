"""What an export's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.distill_cache import DistillCache

from sdxl_distill.export.student import export_student


@pytest.fixture(scope="session")
def export(
    distill_cache: DistillCache, trained_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What a run of an ordinary configuration writes."""
    config = distill_cache.config(trained_run)
    return export_student(config, destination=tmp_path_factory.mktemp("export") / "student")
