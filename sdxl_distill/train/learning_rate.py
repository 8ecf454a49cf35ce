"""The learning rate as a function of the step: warm-up, then constant, cosine or linear."""

from __future__ import annotations

import math
from typing import Literal

LearningRateSchedule = Literal["constant", "cosine", "linear"]


def learning_rate_at(
    step: int,
    *,
    lr: float,
    num_steps: int,
    warmup_steps: int,
    schedule: LearningRateSchedule,
    min_lr_ratio: float = 0.0,
) -> float:
    """Return the rate of optimizer step `step`, counted from 0.

    Rises linearly over `warmup_steps`, so that the first step already moves; then falls to
    `min_lr_ratio · lr` at `num_steps` (cosine: Loshchilov & Hutter 2017, eq. 5, one period).
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * remaining)
