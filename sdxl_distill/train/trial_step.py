"""One step on made-up records: what a run's steps cost, before there is a record of it."""

from __future__ import annotations

import torch
from torch import nn

from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.core.bucket import Bucket
from sdxl_distill.core.noise_schedule import NoiseSchedule, PredictionType
from sdxl_distill.models.unet import UnetGeometry, UnetInput
from sdxl_distill.stream.batch import JoinedBatch
from sdxl_distill.train.step import DistillationStep


def step_of(
    config: DistillConfig, student: nn.Module, schedule: NoiseSchedule, device: torch.device
) -> DistillationStep:
    """Return the step of a run whose teachers predict what the student does."""
    types: list[PredictionType] = [schedule.prediction_type] * len(config.teachers)
    return DistillationStep(
        student,
        schedule,
        types,
        [1 / len(config.teachers)] * len(config.teachers),
        config.training.loss_type,
        config.training.huber_delta,
        device,
    )


def batch_of_zeros(
    config: DistillConfig,
    geometry: UnetGeometry,
    bucket: Bucket,
    num_tokens: int,
    num_records: int,
) -> JoinedBatch:
    """Return a batch of zeros, with predictions of all teachers of a configuration."""
    asked = UnetInput.zeros(geometry, num_records, bucket, num_tokens)
    return JoinedBatch(
        epoch=0,
        step=0,
        bucket=bucket,
        keys=("",) * num_records,
        draws=(0,) * num_records,
        noise=torch.zeros_like(asked.latents),
        predictions=tuple(torch.zeros_like(asked.latents) for _ in config.teachers),
        **asked._asdict(),
    )


def backward_bytes(step: DistillationStep, batch: JoinedBatch) -> int:
    """Return how many bytes of a CUDA device a forward and backward pass takes beyond the weights.

    That is gradients and activations, as the device's allocator counts them. Not compiled: that
    takes less memory, if anything, and long.

    Args:
        step: the step, with the student on the device; its gradients are gone afterwards.
        batch: one micro-batch.

    Raises:
        torch.OutOfMemoryError: when even this does not fit.
    """
    device = step.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        with torch.compiler.set_stance("force_eager"):
            # From the second micro-batch on all gradients are there while activations pile up.
            for _ in range(2):
                step.backward(batch, len(batch))
        return torch.cuda.max_memory_allocated(device) - before
    finally:
        step.student.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
