"""Twenty steps against the golden file: whoever changes what a step does says so."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"


def test_twenty_steps_have_the_golden_losses() -> None:
    """One part in a thousand: processors differ in the order of their sums, and steps add up."""
    built = runpy.run_path(str(GOLDEN / "loss_curve.py"))["build"]()
    golden = json.loads((GOLDEN / "loss_curve.json").read_text("utf-8"))
    assert built.keys() == golden.keys()
    for run, losses in golden.items():
        assert built[run] == pytest.approx(losses, rel=5e-3 if "bfloat16" in run else 1e-3), run
        assert losses[-1] < losses[0]
