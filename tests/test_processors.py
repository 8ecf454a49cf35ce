"""Steps of training as another processor computes them; `make test-processors` runs more."""

from __future__ import annotations

import pytest
from support.processors import run_tests


@pytest.mark.slow
@pytest.mark.multiprocess
def test_steps_hold_without_any_wide_instruction() -> None:
    files = [f"tests/train/test_{name}.py" for name in ("exact_steps", "loss_curve")]
    done = run_tests("SSE4.1", files, quiet=True)
    assert done.returncode == 0, done.stdout
