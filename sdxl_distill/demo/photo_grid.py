"""Held-out photos, noised to the middle of the schedule and denoised by every model of a run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from sdxl_distill.core.loss import teacher_mean
from sdxl_distill.core.noise_schedule import NoiseSchedule, add_noise
from sdxl_distill.core.prediction import convert_prediction
from sdxl_distill.demo.encoded_photos import encode_photos, read_photos
from sdxl_distill.demo.photos import BUCKETS
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.text_encoder import TextEncoders
from sdxl_distill.models.unet import load_unet
from sdxl_distill.models.vae import decode_latents, load_vae

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from torch import nn

    from sdxl_distill.demo.encoded_photos import EncodedPhotos

NUM_STEPS = 15
"""DDIM steps from the middle of the schedule."""

_SHOWN_BUCKET = BUCKETS[3]


@dataclass(frozen=True)
class PhotoGrid:
    """Pictures, one row per photo.

    Attributes:
        columns: the title of each column.
        rows: one picture per column, uint8 [H, W, 3]; all tiles of a row have one size.
        start_timestep: the timestep of the noised photos.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[np.ndarray, ...], ...]
    start_timestep: int


def denoise_photos(
    photos: Path,
    base: Path,
    teachers: Sequence[Path],
    student: Path,
    weights: Sequence[float],
    seed: int = 0,
) -> PhotoGrid:
    """Noise the landscape photos of a folder, and denoise them by every model.

    Args:
        photos: an image folder as `write_photos` writes it.
        base: diffusers folder; its VAE, text encoders and schedule are used for all.
        teachers: diffusers folders.
        student: diffusers folder.
        weights: the teachers' weights in their joint average, summing to 1.
        seed: the seed of the noise.
    """
    # The photos of one bucket, noised.
    checkpoint = ModelFolder.resolve(str(base))
    schedule = checkpoint.noise_schedule()
    vae = load_vae(checkpoint, torch.float32, "cpu")
    start_timestep = schedule.num_train_timesteps // 2
    shown = next(each for each in read_photos(photos) if each.bucket == _SHOWN_BUCKET)
    encoded = encode_photos(shown, vae, TextEncoders.load(checkpoint, "cpu"))
    noise = torch.randn(encoded.latents.shape, generator=torch.Generator().manual_seed(seed))
    alpha = torch.from_numpy(schedule.alphas_cumprod())[start_timestep].expand(len(encoded))
    noisy_latents = add_noise(encoded.latents, noise, alpha)

    # Each model alone, and the teachers together.
    unets = [_load(folder) for folder in (base, *teachers, student)]
    single = [([unet], [1.0]) for unet in unets]
    denoisers = {
        "base": single[0],
        **dict(zip((folder.name for folder in teachers), single[1:-1], strict=True)),
        "teachers' average": (unets[1:-1], weights),
        "student": single[-1],
    }
    latents = {
        "through the VAE": encoded.latents,
        "noised": noisy_latents,
        **{
            name: denoise(encoded, noisy_latents, models, shares, schedule, start_timestep)
            for name, (models, shares) in denoisers.items()
        },
    }
    # Back to pixels, one row per photo.
    pictures = [shown.pixels, *(decode_latents(vae, each) for each in latents.values())]
    rows = zip(*(picture.numpy() for picture in pictures), strict=True)
    return PhotoGrid(("photo", *latents), tuple(rows), start_timestep)


@torch.no_grad()
def denoise(
    photos: EncodedPhotos,
    noisy_latents: torch.Tensor,
    unets: Sequence[nn.Module],
    weights: Sequence[float],
    schedule: NoiseSchedule,
    start_timestep: int,
) -> torch.Tensor:
    """Denoise by the weighted average of UNets' predictions (Song et al. 2021, eq. 12, σ = 0).

    Args:
        photos: the conditioning.
        noisy_latents: [N, 4, h, w] at `start_timestep`.
        unets: one model, or several whose predictions are averaged at every step.
        weights: one per UNet, summing to 1.
        schedule: ᾱ and prediction type of the UNets.
        start_timestep: the timestep of `noisy_latents`.

    Returns:
        Latents, float32 [N, 4, h, w].
    """
    alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod())
    timesteps = torch.linspace(start_timestep, 0, NUM_STEPS + 1).round().to(torch.int64)
    latents = noisy_latents
    for timestep, following in pairwise(timesteps):
        current = timestep.expand(len(photos))
        predictions = [photos.predict(unet, noisy_latents, current) for unet in unets]
        prediction = teacher_mean(predictions, weights)
        # What the prediction says of image and noise, put together again at the next timestep.
        latents, noise = (
            convert_prediction(
                prediction,
                noisy_latents,
                alphas_cumprod[current],
                schedule.prediction_type,
                target_type,
            )
            for target_type in ("sample", "epsilon")
        )
        noisy_latents = add_noise(latents, noise, alphas_cumprod[following.expand(len(photos))])
    return latents


def _load(folder: Path) -> nn.Module:
    return load_unet(ModelFolder.resolve(str(folder)), torch.float32, "cpu")
