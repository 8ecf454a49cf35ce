"""Did distillation work? Distances to the teachers' average on photos that no model has seen.

Noise and timesteps are fresh, so that neither memorised photos nor memorised noise help.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sdxl_distill.core.loss import loss_floor, squared_distance, teacher_mean
from sdxl_distill.core.noise_schedule import add_noise
from sdxl_distill.demo.encoded_photos import encode_photos, read_photos
from sdxl_distill.demo.training import spread_timesteps
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.text_encoder import TextEncoders
from sdxl_distill.models.unet import load_unet
from sdxl_distill.models.vae import load_vae

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from diffusers import UNet2DConditionModel

    from sdxl_distill.demo.encoded_photos import EncodedPhotos

MAX_SHARE_OF_BASE = 0.25
"""A student that is further than this from the teachers' average has not been distilled."""


@dataclass(frozen=True)
class Evaluation:
    """Mean squared distances of predictions to the teachers' average, per latent element.

    Attributes:
        base: distance of the model that the student started from.
        mean_of_weights: distance of one model with the average of the teachers' weights, which
            costs nothing to make.
        student: distance of the distilled model.
        spread: mean distance of the teachers themselves, Σ wₖ‖tₖ − t̄‖².
        num_predictions: photos × draws behind each number.
    """

    base: float
    mean_of_weights: float
    student: float
    spread: float
    num_predictions: int

    @property
    def student_share(self) -> float:
        """The student's distance as a share of the base's: 0 is perfect, 1 is no progress."""
        return self.student / self.base

    @property
    def mean_of_weights_share(self) -> float:
        """The same for the mean of weights."""
        return self.mean_of_weights / self.base

    @property
    def has_distilled(self) -> bool:
        """Whether the student is at most a quarter as far as the base and beats the mean."""
        return self.student_share <= MAX_SHARE_OF_BASE and self.student < self.mean_of_weights


def evaluate(
    photos: Path,
    base: Path,
    teachers: Sequence[Path],
    student: Path,
    weights: Sequence[float] | None = None,
    num_draws: int = 8,
    seed: int = 0,
) -> Evaluation:
    """Measure a student on an image folder.

    Args:
        photos: held-out photos as `write_photos` writes them.
        base: diffusers folder; its VAE, text encoders and noise schedule are used for all.
        teachers: diffusers folders of the base's family, of the base's prediction type.
        student: diffusers folder.
        weights: the teachers' weights, summing to 1; equal when None.
        num_draws: (timestep, noise) pairs per photo; timesteps spread over the schedule.
        seed: the seed of timesteps and noise.
    """
    # Every model, and one source of randomness for all.
    weights = weights or [1 / len(teachers)] * len(teachers)
    teacher_unets = [_load(teacher) for teacher in teachers]
    candidates = [_load(base), mean_of_weights(teacher_unets, weights), _load(student)]
    generator = torch.Generator().manual_seed(seed)
    alphas_cumprod = torch.from_numpy(
        ModelFolder.resolve(str(base)).noise_schedule().alphas_cumprod()
    )
    # Sums over all photos and draws, one bucket at a time.
    totals = torch.zeros(len(candidates) + 1, dtype=torch.float64)
    num_predictions = 0
    for encoded in encode_folder(photos, base):
        batch = encoded[torch.arange(len(encoded)).repeat_interleave(num_draws)]
        timesteps = torch.cat(
            [spread_timesteps(num_draws, len(alphas_cumprod), generator) for _ in encoded.time_ids]
        )
        noise = torch.randn(batch.latents.shape, generator=generator)
        noisy_latents = add_noise(batch.latents, noise, alphas_cumprod[timesteps])
        totals += _distances(batch, noisy_latents, timesteps, teacher_unets, weights, candidates)
        num_predictions += len(batch)
    distances = (totals / num_predictions).tolist()
    return Evaluation(*distances, num_predictions=num_predictions)


def encode_folder(photos: Path, checkpoint: Path) -> list[EncodedPhotos]:
    """Encode an image folder with a checkpoint's VAE and text encoders, one element per bucket."""
    source = ModelFolder.resolve(str(checkpoint))
    vae = load_vae(source, torch.float32, "cpu")
    texts = TextEncoders.load(source, "cpu")
    return [encode_photos(each, vae, texts) for each in read_photos(photos)]


def mean_of_weights(
    unets: Sequence[UNet2DConditionModel], weights: Sequence[float]
) -> UNet2DConditionModel:
    """Return a new UNet whose every tensor is the weighted average of the given ones."""
    states = [unet.state_dict() for unet in unets]
    mean = copy.deepcopy(unets[0])
    mean.load_state_dict(
        {
            name: sum(weight * state[name] for weight, state in zip(weights, states, strict=True))
            for name in states[0]
        }
    )
    return mean


@torch.no_grad()
def _distances(
    batch: EncodedPhotos,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    teachers: Sequence[UNet2DConditionModel],
    weights: Sequence[float],
    candidates: Sequence[UNet2DConditionModel],
) -> torch.Tensor:
    """Return each candidate's summed distance to the average and the teachers' spread around it."""
    predictions = [batch.predict(teacher, noisy_latents, timesteps) for teacher in teachers]
    mean = teacher_mean(predictions, weights)
    distances = [
        squared_distance(batch.predict(unet, noisy_latents, timesteps), mean).sum()
        for unet in candidates
    ]
    return torch.stack([*distances, loss_floor(predictions, weights, mean).sum()]).double()


def _load(folder: Path) -> UNet2DConditionModel:
    return load_unet(ModelFolder.resolve(str(folder)), torch.float32, "cpu")
