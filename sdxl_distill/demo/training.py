"""Training of the demo's VAE and UNets: small loops whose only randomness is their generator."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F

from sdxl_distill.core.noise_schedule import NoiseSchedule, add_noise
from sdxl_distill.demo.looks import LOOKS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import nn

    from sdxl_distill.demo.encoded_photos import EncodedPhotos, Photos

BATCH_SIZE = 16
"""Photos of a UNet's training step, all of one bucket."""

_WARM_UP_SHARE = 0.15
_PATCH_PX = 64
_NUM_PATCHES = 8
_L1_SHARE = 0.1
_LATENT_NOISE = 0.05


def train_vae(
    vae: AutoencoderKL,
    photos: Sequence[Photos],
    num_steps: int,
    peak_lr: float,
    generator: torch.Generator,
    on_step: Callable[[int, float], None],
) -> None:
    """Train an autoencoder on patches, then set its scaling factor so that latents have std 1.

    Args:
        vae: the autoencoder, trained in place.
        photos: the photos, shown half of the time in one of the teachers' looks.
        num_steps: the number of steps, of 8 patches each.
        peak_lr: the highest learning rate.
        generator: the source of patches, looks and the noise that latents must survive.
        on_step: a function that gets step (from 1) and loss.
    """
    step_weights = _weight_steps(vae, num_steps, peak_lr)
    sources = [torch.cat([each.pixels, each.mirrored().pixels]) for each in photos]
    for step in range(1, num_steps + 1):
        patches = _draw_patches(sources[step % len(sources)], generator)
        latents = _encode(vae, patches)
        disturbed = latents + _LATENT_NOISE * torch.randn(latents.shape, generator=generator)
        (decoded,) = vae.decode(cast("torch.FloatTensor", disturbed), return_dict=False)
        loss = F.mse_loss(decoded, patches) + _L1_SHARE * F.l1_loss(decoded, patches)
        step_weights(loss)
        on_step(step, loss.item())
    _set_scaling_factor(vae, photos)


def train_unet(
    unet: UNet2DConditionModel,
    photos: Sequence[EncodedPhotos],
    schedule: NoiseSchedule,
    num_steps: int,
    peak_lr: float,
    generator: torch.Generator,
    on_step: Callable[[int, float], None],
) -> None:
    """Train a UNet to predict the noise in photos (Ho et al. 2020, eq. 14).

    Args:
        unet: the UNet, trained in place.
        photos: one element per bucket; buckets take turns.
        schedule: the noise schedule, of prediction type epsilon.
        num_steps: the number of steps, of 16 photos each.
        peak_lr: the highest learning rate.
        generator: the source of photos, timesteps and noise.
        on_step: a function that gets step (from 1) and loss.
    """
    step_weights = _weight_steps(unet, num_steps, peak_lr)
    alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod())
    for step in range(1, num_steps + 1):
        # Photos of one bucket, each at a timestep and with noise of its own.
        bucket = photos[step % len(photos)]
        batch = bucket[torch.randint(len(bucket), (BATCH_SIZE,), generator=generator)]
        timesteps = spread_timesteps(BATCH_SIZE, schedule.num_train_timesteps, generator)
        noise = torch.randn(batch.latents.shape, generator=generator)
        noisy_latents = add_noise(batch.latents, noise, alphas_cumprod[timesteps])
        loss = F.mse_loss(batch.predict(unet, noisy_latents, timesteps), noise)
        step_weights(loss)
        on_step(step, loss.item())


def spread_timesteps(count: int, num_timesteps: int, generator: torch.Generator) -> torch.Tensor:
    """Draw int64 [count] timesteps, one in each of `count` equal parts of the schedule."""
    parts = torch.arange(count) + torch.rand(count, generator=generator)
    return (parts * num_timesteps / count).to(torch.int64).clamp(max=num_timesteps - 1)


def _weight_steps(
    network: nn.Module, num_steps: int, peak_lr: float
) -> Callable[[torch.Tensor], None]:
    """Return a function that steps AdamW down a loss: linear warm-up, then a cosine to zero."""
    network.train()
    network.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        network.parameters(), peak_lr, betas=(0.9, 0.99), weight_decay=0.0
    )

    def share_of_peak(step: int) -> float:
        warm_up = (step + 1) / (_WARM_UP_SHARE * num_steps)
        return min(warm_up, 0.5 + 0.5 * math.cos(math.pi * step / num_steps))

    learning_rate = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)

    def step_weights(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        learning_rate.step()

    return step_weights


def _draw_patches(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Cut random squares of uint8 [N, H, W, 3]; returns float32 [8, 3, 64, 64] in −1 … 1."""
    looks = [*LOOKS.values(), *[None] * len(LOOKS)]
    limits = (len(pixels), pixels.shape[1] - _PATCH_PX + 1, pixels.shape[2] - _PATCH_PX + 1)
    patches = []
    for _ in range(_NUM_PATCHES):
        number, top, left, choice = (
            int(torch.randint(limit, (), generator=generator)) for limit in (*limits, len(looks))
        )
        square = pixels[number, top : top + _PATCH_PX, left : left + _PATCH_PX]
        patch = square.permute(2, 0, 1)[None] / 255
        look = looks[choice]
        patches.append(patch if look is None else look(patch))
    return torch.cat(patches) * 2 - 1


def _encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    (posterior,) = vae.encode(pixels, return_dict=False)
    return posterior.mode()


@torch.no_grad()
def _set_scaling_factor(vae: AutoencoderKL, photos: Sequence[Photos]) -> None:
    """Make scaled latents have unit variance (Rombach et al. 2022, appendix G)."""
    vae.eval()
    means = [_encode(vae, each.pixels.permute(0, 3, 1, 2) / 127.5 - 1).flatten() for each in photos]
    vae.register_to_config(scaling_factor=1 / float(torch.cat(means).std()))
