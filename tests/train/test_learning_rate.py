"""The learning rate as a function of the step, against torch's own schedulers."""

from __future__ import annotations

import pytest
import torch

from sdxl_distill.train.learning_rate import learning_rate_at

pytestmark = pytest.mark.processors

SETTINGS = {"lr": 0.5, "num_steps": 100, "warmup_steps": 10}


def test_warm_up_rises_linearly_and_moves_from_the_first_step() -> None:
    rates = [learning_rate_at(step, schedule="constant", **SETTINGS) for step in range(12)]
    assert rates[:10] == pytest.approx([0.05 * step for step in range(1, 11)])
    assert rates[10:] == [0.5, 0.5]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_equals_torchs_schedulers(schedule: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    oracle = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=0.05)
        if schedule == "cosine"
        else torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=90)
    )
    for step in range(10, 101):
        ours = learning_rate_at(step, schedule=schedule, min_lr_ratio=0.1, **SETTINGS)
        assert ours == pytest.approx(oracle.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        oracle.step()


def test_rate_stays_at_its_end_beyond_the_run() -> None:
    settings = {**SETTINGS, "warmup_steps": 0}
    assert learning_rate_at(500, schedule="linear", min_lr_ratio=0.2, **settings) == 0.1
