"""One optimizer step's arithmetic: student forward, distance to the teachers' mean, backward.

In: a rank's share of a global batch. Out: gradients on the student and sums of the losses,
still on the device. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sdxl_distill.core.loss import (
    LossType,
    loss_floor,
    record_loss,
    squared_distance,
    teacher_mean,
)
from sdxl_distill.core.noise_schedule import NoiseSchedule, PredictionType, add_noise
from sdxl_distill.core.prediction import convert_prediction
from sdxl_distill.models.unet import predict
from sdxl_distill.runtime.device import CopyStream
from sdxl_distill.stream.batch import JoinedBatch


def loss_weighting(timesteps: torch.Tensor) -> torch.Tensor:
    """Return the weight of each record's loss, float32 [B]; uniform.

    The one seam for a weighting by timestep, such as min-SNR (Hang et al. 2023, eq. 7).
    """
    return torch.ones(timesteps.shape, dtype=torch.float32, device=timesteps.device)


@dataclass(frozen=True)
class RecordLosses:
    """Losses of each record of a batch, float32; `teachers` is [K, B], the others [B]."""

    loss: torch.Tensor
    floor: torch.Tensor
    teachers: torch.Tensor

    def sums(self) -> torch.Tensor:
        """Return the sums over the records as one vector: loss, floor, then each teacher."""
        totals = [self.loss.sum()[None], self.floor.sum()[None], self.teachers.sum(dim=1)]
        return torch.cat(totals).detach()


class DistillationStep:
    """Computes losses and gradients of the student.

    Args:
        student: the UNet, possibly wrapped for data parallelism.
        noise_schedule: the student's noise schedule; all joined sets share its ᾱ.
        teacher_types: prediction type of each teacher, in the order of the joined sets.
        weights: weight of each teacher, summing to 1.
        loss_type: the loss that is minimised.
        huber_delta: distance at which huber and smooth_l1 turn linear.
        device: the student's device.
    """

    def __init__(
        self,
        student: nn.Module,
        noise_schedule: NoiseSchedule,
        teacher_types: Sequence[PredictionType],
        weights: Sequence[float],
        loss_type: LossType,
        huber_delta: float,
        device: torch.device,
    ) -> None:
        self.student = student
        self.prediction_type: PredictionType = noise_schedule.prediction_type
        self.alphas_cumprod = torch.from_numpy(noise_schedule.alphas_cumprod()).to(device)
        self.teacher_types = tuple(teacher_types)
        self.weights = tuple(weights)
        self.loss_type: LossType = loss_type
        self.huber_delta = huber_delta
        self.device = device
        self._copies = CopyStream(device)

    def losses(self, batch: JoinedBatch) -> RecordLosses:
        """Run the student on a micro-batch and compare it with its teachers.

        Floor and teacher losses are plain MSE whatever the loss, so that
        Σ wₖ‖s - tₖ‖² = ‖s - t̄‖² + floor holds for what is logged.
        """
        # The student's prediction.
        alphas = self.alphas_cumprod[batch.timesteps]
        noisy_latents = add_noise(batch.latents, batch.noise, alphas)
        prediction = predict(
            self.student,
            noisy_latents,
            batch.timesteps,
            batch.encoder_hidden_states,
            batch.pooled_embeds,
            batch.time_ids,
        )

        # The teachers' predictions, converted to the student's type.
        targets = [
            target
            if source == self.prediction_type
            else convert_prediction(target, noisy_latents, alphas, source, self.prediction_type)
            for target, source in zip(batch.predictions, self.teacher_types, strict=True)
        ]

        # Distances to each of them and to their mean.
        with torch.no_grad():
            mean = teacher_mean(targets, self.weights)
            floor = loss_floor(targets, self.weights, mean)
            teachers = torch.stack([squared_distance(prediction, target) for target in targets])
        loss = record_loss(prediction, mean, self.loss_type, self.huber_delta)
        return RecordLosses(loss * loss_weighting(batch.timesteps), floor, teachers)

    def backward(self, batch: JoinedBatch, micro_batch_size: int) -> torch.Tensor:
        """Add the gradients of the mean loss over the global batch; return the loss sums.

        Data parallelism averages gradients over ranks, each of which holds an equal share, so
        a rank divides by its own share: a short last micro-batch counts record by record.

        Returns:
            `RecordLosses.sums` of this rank's records, float32 [2 + K], on the device.
        """
        sums = torch.zeros(2 + len(self.weights), dtype=torch.float32, device=self.device)
        num_done = 0
        for micro_batch in batch.micro_batches(micro_batch_size):
            num_done += len(micro_batch)
            with self._synchronised(num_done == len(batch)):
                losses = self.losses(micro_batch.uploaded(self._copies))
                (losses.loss.sum() / len(batch)).backward()
            sums += losses.sums()
        return sums

    def _synchronised(self, is_last: bool) -> AbstractContextManager[None]:
        if is_last or not isinstance(self.student, DistributedDataParallel):
            return nullcontext()
        return self.student.no_sync()
