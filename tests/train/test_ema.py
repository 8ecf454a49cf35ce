"""The moving average of the student."""

from __future__ import annotations

import pytest
import torch

from sdxl_distill.errors import IncompatibleError
from sdxl_distill.train.ema import Ema, ema_decay_at

pytestmark = pytest.mark.processors


def test_decay_warms_up_to_its_limit() -> None:
    assert ema_decay_at(0, 0.9999) == pytest.approx(0.1)
    assert ema_decay_at(90, 0.9999) == pytest.approx(0.91)
    assert ema_decay_at(10**7, 0.9999) == 0.9999


def test_average_follows_the_recurrence_in_float32() -> None:
    parameter = torch.zeros(4, dtype=torch.bfloat16)
    ema = Ema([("weight", parameter)], 0.9)
    expected = torch.zeros(4, dtype=torch.float64)
    for step in range(50):
        parameter.fill_(step * 0.125)
        ema.update([("weight", parameter)], step)
        decay = ema_decay_at(step, 0.9)
        expected = decay * expected + (1 - decay) * parameter.double()
    assert ema.averages["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.averages["weight"].double(), expected, rtol=1e-6, atol=1e-6)


def test_averages_do_not_alias_the_parameters() -> None:
    parameter = torch.zeros(2)
    ema = Ema([("weight", parameter)], 0.9)
    parameter.fill_(1)
    assert ema.averages["weight"].tolist() == [0, 0]


def test_loading_another_students_averages_is_refused() -> None:
    ema = Ema([("weight", torch.zeros(2))], 0.9)
    with pytest.raises(IncompatibleError, match="'weight'"):
        ema.load({"weight": torch.zeros(3)})
