"""The distillation loss, its floor and the per-teacher losses: one value per record, [B]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

LossType = Literal["mse", "huber", "smooth_l1"]


def record_loss(
    prediction: torch.Tensor, target: torch.Tensor, loss_type: LossType, delta: float = 1.0
) -> torch.Tensor:
    """Return the mean loss of each record, float32 [B].

    Args:
        prediction: the student's prediction [B, C, h, w].
        target: the tensor that it is compared with [B, C, h, w].
        loss_type: `mse`; `huber` (Huber 1964): d²/2 within ±delta, linear beyond;
            `smooth_l1`: huber divided by delta (Girshick 2015).
        delta: the difference at which the last two turn from square to linear.
    """
    prediction, target = prediction.to(torch.float32), target.to(torch.float32)
    if loss_type == "mse":
        elementwise = F.mse_loss(prediction, target, reduction="none")
    elif loss_type == "huber":
        elementwise = F.huber_loss(prediction, target, reduction="none", delta=delta)
    else:
        elementwise = F.smooth_l1_loss(prediction, target, reduction="none", beta=delta)
    return elementwise.flatten(1).mean(dim=1)


def squared_distance(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference of each record, float32 [B]."""
    return record_loss(left, right, "mse")


def teacher_mean(predictions: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the weighted average t̄ = Σ wₖ tₖ, float32 [B, C, h, w].

    One teacher at a time, so that only one of them exists in float32.

    Args:
        predictions: one tensor [B, C, h, w] per teacher, of any floating dtype.
        weights: one per teacher, summing to 1.
    """
    mean = torch.zeros_like(predictions[0], dtype=torch.float32)
    for prediction, weight in zip(predictions, weights, strict=True):
        mean.add_(prediction, alpha=weight)
    return mean


def loss_floor(
    predictions: Sequence[torch.Tensor], weights: Sequence[float], mean: torch.Tensor
) -> torch.Tensor:
    """Return Σ wₖ‖tₖ - t̄‖², float32 [B]: a lower bound of every student's Σ wₖ‖s - tₖ‖².

    Since Σ wₖ‖s - tₖ‖² = ‖s - t̄‖² + floor for weights that sum to 1.
    """
    floor = torch.zeros(mean.shape[0], dtype=torch.float32, device=mean.device)
    for prediction, weight in zip(predictions, weights, strict=True):
        floor += weight * squared_distance(prediction, mean)
    return floor
