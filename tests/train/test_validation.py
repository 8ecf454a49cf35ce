"""Validation of the student and of its average."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from support.distill_cache import WEIGHTS, DistillCache

from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.demo.family import Family
from sdxl_distill.runtime.stop_request import StopRequest
from sdxl_distill.stream.batch import JoinedBatch
from sdxl_distill.stream.loader import JoinedStream
from sdxl_distill.train.average_exchange import lent_averages
from sdxl_distill.train.ema import Ema
from sdxl_distill.train.step import DistillationStep
from sdxl_distill.train.validation import validation_losses

pytestmark = pytest.mark.processors

CPU = torch.device("cpu")


def student_of(family: Family) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(family.base / "unet")


def step_of(student: torch.nn.Module) -> DistillationStep:
    types = ["epsilon"] * len(WEIGHTS)
    weights = tuple(WEIGHTS.values())
    return DistillationStep(student, NoiseSchedule(), types, weights, "mse", 1.0, CPU)


def test_losses_are_means_over_the_records_whatever_the_batches(
    distill_cache: DistillCache, tiny_family: Family
) -> None:
    step, accelerator = step_of(student_of(tiny_family)), Accelerator(cpu=True)
    with (
        distill_cache.teachers() as teachers,
        JoinedStream(teachers, global_batch=4, validation_fraction=0.3) as stream,
    ):
        assert stream.num_validation_records >= 3
        by_one = validation_losses(step, stream.validation_batches(1), accelerator, StopRequest())
        by_four = validation_losses(step, stream.validation_batches(4), accelerator, StopRequest())
        assert by_one is not None
        with torch.no_grad():
            records = [step.losses(each).loss for each in stream.validation_batches(2)]
    assert by_one == pytest.approx(by_four, rel=1e-5)
    assert by_one[0] == pytest.approx(torch.cat(records).mean().item(), rel=1e-5)


def test_no_records_at_all_are_zeros(tiny_family: Family) -> None:
    step, accelerator = step_of(student_of(tiny_family)), Accelerator(cpu=True)
    assert validation_losses(step, [], accelerator, StopRequest()) == [0.0] * 4


def test_it_is_given_up_when_asked_to_stop(
    distill_cache: DistillCache, tiny_family: Family
) -> None:
    step, stop = step_of(student_of(tiny_family)), StopRequest()
    with (
        distill_cache.teachers() as teachers,
        JoinedStream(teachers, global_batch=4, validation_fraction=0.3) as stream,
    ):

        def batches() -> Iterator[JoinedBatch]:
            for number, batch in enumerate(stream.validation_batches(1)):
                assert number < 2, "it went on"
                yield batch
                stop.request()

        assert validation_losses(step, batches(), Accelerator(cpu=True), stop) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_lent_and_the_weights_come_back(
    tiny_family: Family, dtype: torch.dtype
) -> None:
    student = student_of(tiny_family).to(dtype)
    ema = Ema(student.named_parameters(), 0.5)
    for average in ema.averages.values():
        average.mul_(1.5)
    own = {name: weight.clone() for name, weight in student.named_parameters()}
    with lent_averages(student, ema, Accelerator(cpu=True)):
        for name, weight in student.named_parameters():
            assert torch.equal(weight, ema.averages[name].to(dtype))
    assert all(torch.equal(weight, own[name]) for name, weight in student.named_parameters())
