"""Losses per record, their floor, and the identity that ties them together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from sdxl_distill.core.loss import loss_floor, record_loss, squared_distance, teacher_mean

pytestmark = pytest.mark.processors


def tensors(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4, 5, 6, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(
    ("loss_type", "oracle"),
    [
        ("mse", torch.nn.MSELoss()),
        ("huber", torch.nn.HuberLoss(delta=0.5)),
        ("smooth_l1", torch.nn.SmoothL1Loss(beta=0.5)),
    ],
)
def test_each_record_has_torchs_loss(loss_type: str, oracle: torch.nn.Module) -> None:
    prediction, target = tensors(2)
    losses = record_loss(prediction, target, loss_type, 0.5)
    assert losses.shape == (3,)
    for record in range(3):
        torch.testing.assert_close(losses[record], oracle(prediction[record], target[record]))


@pytest.mark.parametrize(
    ("loss_type", "oracle"),
    [("huber", torch.nn.HuberLoss()), ("smooth_l1", torch.nn.SmoothL1Loss())],
)
def test_losses_turn_linear_where_torchs_do(loss_type: str, oracle: torch.nn.Module) -> None:
    prediction, target = tensors(2)
    losses = record_loss(prediction, target, loss_type)
    torch.testing.assert_close(losses[1], oracle(prediction[1], target[1]))


def test_losses_are_taken_in_float32() -> None:
    prediction = torch.full((1, 4, 8, 8), 300.0, dtype=torch.float16)
    assert float(record_loss(prediction, torch.zeros_like(prediction), "mse")) == 90_000


@given(seed=st.integers(0, 2**31), count=st.integers(1, 6))
def test_teacher_losses_are_distance_to_the_mean_plus_the_floor(seed: int, count: int) -> None:
    student, *teachers = tensors(count + 1, seed)
    raw = torch.rand(count, generator=torch.Generator().manual_seed(seed)) + 0.05
    weights = (raw / raw.sum()).tolist()
    mean = teacher_mean(teachers, weights)
    weighted = sum(w * squared_distance(student, t) for w, t in zip(weights, teachers, strict=True))
    floor = loss_floor(teachers, weights, mean)
    torch.testing.assert_close(weighted, squared_distance(student, mean) + floor)


def test_mean_of_half_precision_predictions_is_float32() -> None:
    teachers = [tensor.half() for tensor in tensors(3)]
    weights = [0.2, 0.3, 0.5]
    expected = sum(w * t.double() for w, t in zip(weights, teachers, strict=True))
    mean = teacher_mean(teachers, weights)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-6)
