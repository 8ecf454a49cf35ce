"""The VAE: pixels to scaled latents as records hold them, and back for pictures to look at.

Encoding takes the mean of the posterior, never a draw, so that an image has one latents tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from sdxl_distill.errors import IncompatibleError, NumericalError
from sdxl_distill.models.component import channels_last_on_gpu
from sdxl_distill.models.model_folder import ModelFolder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

PIXELS_PER_LATENT = 8
_UNSUPPORTED_FIELDS = ("latents_mean", "latents_std", "shift_factor")
_SAFE_TYPES = (torch.float32, torch.bfloat16)


def latent_channels(checkpoint: ModelFolder) -> int:
    """Read the channels of a VAE's latents from its configuration, without its weights.

    Raises:
        ConfigError, CorruptError: when the configuration is missing or unreadable.
        IncompatibleError: when latents are not `mean · scaling_factor` at an eighth of the size.
    """
    vae = checkpoint.vae
    for name in _UNSUPPORTED_FIELDS:
        if vae.field(name) is not None:
            raise IncompatibleError(
                f"a VAE with {name} {vae.field(name)!r}",
                expected="null: SDXL's latents are scaled, never shifted",
                where=str(vae.folder),
                action="use the VAE of an SDXL checkpoint",
            )
    widths, scaling_factor = vae.field("block_out_channels"), vae.field("scaling_factor")
    if (
        not isinstance(widths, list)
        or 2 ** (len(widths) - 1) != PIXELS_PER_LATENT
        or not isinstance(scaling_factor, int | float)
    ):
        raise IncompatibleError(
            f"a VAE with block_out_channels {widths!r}, scaling_factor {scaling_factor!r}",
            expected=f"blocks that reduce the size {PIXELS_PER_LATENT} times, and a number",
            where=str(vae.folder),
            action="use the VAE of an SDXL checkpoint",
        )
    return vae.size("latent_channels")


def load_vae(
    checkpoint: ModelFolder, dtype: torch.dtype, device: torch.device | str
) -> AutoencoderKL:
    """Load a VAE, frozen and in evaluation mode.

    Args:
        checkpoint: the folder that holds it.
        dtype: float32 or bfloat16; in float16 SDXL's VAE overflows to NaN.
        device: the device that it runs on.

    Raises:
        ConfigError, CorruptError, IncompatibleError: as `latent_channels` and `Component.load`.
    """
    assert dtype in _SAFE_TYPES, dtype
    latent_channels(checkpoint)
    return cast("AutoencoderKL", channels_last_on_gpu(checkpoint.vae.load(dtype, device)))


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Return scaled latents, float16 [B, C, H/8, W/8], on the VAE's device.

    Args:
        vae: a VAE from `load_vae`.
        pixels: RGB, uint8 [B, H, W, 3], any device; H and W divisible by 8.

    Raises:
        NumericalError: when a value is NaN, infinite or beyond float16.
    """
    images = 2.0 * (pixels.to(vae.device, torch.float32).permute(0, 3, 1, 2) / 255.0) - 1.0
    (posterior,) = vae.encode(images.to(vae.dtype), return_dict=False)
    mean = posterior.mode().to(torch.float32)
    latents = (mean * vae.config["scaling_factor"]).to(torch.float16).contiguous()
    finite = torch.isfinite(latents).flatten(1).all(dim=1)
    if not finite.all():
        broken = (~finite).nonzero().flatten().tolist()
        raise NumericalError(
            f"latents of images {broken} of the batch are NaN, infinite or beyond float16",
            expected="finite latents",
            where=f"VAE in {vae.dtype}",
            action="encode in float32; if that does not help, the VAE's weights are broken",
        )
    return latents


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Return RGB pixels, uint8 [B, H, W, 3], on the VAE's device.

    Args:
        vae: a VAE from `load_vae`.
        latents: scaled latents [B, C, H/8, W/8], any float type and device.
    """
    unscaled = latents.to(vae.device, torch.float32) / vae.config["scaling_factor"]
    (images,) = vae.decode(unscaled.to(vae.dtype), return_dict=False)
    pixels = (images.to(torch.float32) / 2 + 0.5).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
