"""What one rank alone concludes; test_resume.py has several."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator

from sdxl_distill.train.agreement import Agreement, Verdict


@pytest.mark.parametrize(
    ("stop", "numbers", "verdict"),
    [
        (False, [1.0, -2.0], Verdict(stop=False, is_finite=True)),
        (True, [0.0], Verdict(stop=True, is_finite=True)),
        (False, [1.0, math.nan], Verdict(stop=False, is_finite=False)),
        (True, [-math.inf, 1.0], Verdict(stop=True, is_finite=False)),
        (False, [3.0e38, 3.0e38], Verdict(stop=False, is_finite=True)),
    ],
)
def test_the_verdict_is_what_was_asked(stop: bool, numbers: list[float], verdict: Verdict) -> None:
    agreement = Agreement(Accelerator(cpu=True))
    agreement.ask(stop, torch.tensor(numbers))
    assert agreement.answer() == verdict
