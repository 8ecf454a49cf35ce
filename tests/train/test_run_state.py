"""The JSON part of a checkpoint, which may come from a stranger."""

from __future__ import annotations

from typing import Any

import pytest

from sdxl_distill.errors import CorruptError
from sdxl_distill.train.run_state import Position, RunState

STATE = RunState(Position(7, 1, 2), {"config": {}}, {"seed": 1}, {"states": "fp32"})


def test_it_comes_back() -> None:
    assert RunState.from_json(STATE.to_json(), "here") == STATE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": {"global_step": 7, "epoch": 1}}, "no field 'step'"),
        ({"position": None}, "no field"),
        ({"position": {"global_step": 7, "epoch": True, "step": 2}}, "position.epoch is True"),
        ({"position": {"global_step": 7, "epoch": 1, "step": -2}}, "position.step is -2"),
        ({"stream": "x"}, "stream is 'x'"),
    ],
)
def test_what_is_no_state_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptError, match=message) as caught:
        RunState.from_json(STATE.to_json() | change, "step-00000007")
    assert "step-00000007" in str(caught.value)
