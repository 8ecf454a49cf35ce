"""Each benchmark runs on a small size and gives well-formed rows; the numbers do not matter."""

# pyright: reportMissingImports=false
from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from measuring.page import page_text, write_page
from measuring.row import Curve, Row, table
from run import BENCHMARKS as NAMES, FOLDER, LATEST


def require_well_formed(row: Row) -> None:
    assert row.metric
    assert row.better in ("higher", "lower")
    if row.value is None:
        assert row.against, "a reason is missing"
        return
    assert math.isfinite(row.value)
    assert row.unit
    if row.spread is not None:
        assert row.spread[0] <= row.value <= row.spread[1]


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_runs_on_a_small_size_and_its_rows_are_well_formed(
    name: str, tmp_path: Path
) -> None:
    found = list(importlib.import_module(name).measure(small=True))
    rows = [each for each in found if isinstance(each, Row)]
    assert rows
    for row in rows:
        require_well_formed(row)
    assert len({row.label for row in rows}) == len(rows)
    named = [{**row.to_json(), "metric": f"{name}: {row.metric}"} for row in rows]
    curves = [each.to_json() for each in found if isinstance(each, Curve)]
    content = {"machine": {}, "versions": {}, "rows": named, "curves": curves}
    write_page(json.loads(json.dumps(content)), tmp_path)
    page = (tmp_path / "performance.md").read_text("utf-8")
    assert table(rows) in page
    for curve in curves:
        assert f"![{curve['figure']}]" in page


def test_the_page_is_what_the_latest_results_say() -> None:
    page = (FOLDER.parent / "docs/performance.md").read_text("utf-8")
    assert page == page_text(json.loads(LATEST.read_text("utf-8")))


def test_every_script_is_in_the_run() -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"run"}
    assert scripts == set(NAMES)
