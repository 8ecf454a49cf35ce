"""The tiny VAE: AutoencoderKL with 4 latent channels at an eighth of the resolution."""

from __future__ import annotations

from diffusers import AutoencoderKL

WIDTH = 12
"""Channels everywhere: one positive and one negative copy of each of six signals."""


def new_vae() -> AutoencoderKL:
    """Build the autoencoder of [B, 3, H, W] pixels in −1 … 1; the caller draws its weights."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(WIDTH,) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=128,
        scaling_factor=0.13025,
        mid_block_add_attention=False,
    )
