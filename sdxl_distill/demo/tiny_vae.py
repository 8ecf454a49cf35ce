"""The tiny VAE: AutoencoderKL with 4 latent channels at an eighth of the resolution.

It starts as a nearly linear averaging pyramid and is trained from there: a random start spends
most of a laptop's two minutes on finding out that neighbouring pixels are alike.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from sdxl_distill.demo.weights import draw_weights

WIDTH = 12
"""Channels everywhere."""

# What each channel carries: a pair (s, −s) for each of the four latents, one constant pair.
_PLUS, _MINUS = (0, 1, 2, 3), (4, 5, 6, 7)
_CARRIER_PLUS, _CARRIER_MINUS = 8, 9
_NUM_LAID = 10

_CARRIER_LEVEL = 5.0
"""Far above the signals, so that a normalisation divides all images by nearly the same."""

# Luminance, blue-yellow and red-green of RGB, scaled so that photos fill each about equally.
_OPPONENT_OF_RGB = ((0.6, 0.6, 0.6), (-0.8, -0.8, 1.6), (1.9, -1.9, 0.0))
_LUMA, _NUM_COLORS, _DETAIL = 0, 3, 3
_DETAIL_GAIN = 2.5
_INITIAL_LOGVAR = -6.0
_BINOMIAL = torch.tensor([0.25, 0.5, 0.25])


def new_vae() -> AutoencoderKL:
    """Build the autoencoder of [B, 3, H, W] pixels in −1 … 1; the caller draws its weights."""
    architecture: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (WIDTH,) * 4,
        "norm_num_groups": 1,
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(latent_channels=4, sample_size=128, scaling_factor=1.0, **architecture)


def draw_pyramid(vae: AutoencoderKL, generator: torch.Generator) -> None:
    """Draw weights whose linear part is an averaging pyramid, up and down.

    Latents 0 … 2 are the block averages of luminance and two colour differences; latent 3 is
    the luminance average halfway between blocks, minus what the blocks around it predict.

    Signals travel as pairs (s, −s), because SiLU(s) − SiLU(−s) = s undoes the activation before
    each half's last convolution. Residual branches start at zero.
    """
    draw_weights(vae, generator)
    with torch.no_grad():
        for block in vae.modules():
            if isinstance(block, ResnetBlock2D):
                nn.init.zeros_(block.conv2.weight)
                nn.init.zeros_(cast("torch.Tensor", block.conv2.bias))
        for layer in (vae.quant_conv, vae.post_quant_conv):
            layer = cast("nn.Conv2d", layer)
            nn.init.dirac_(layer.weight)
            nn.init.zeros_(cast("torch.Tensor", layer.bias))
        _lay_encoder(vae.encoder)
        _lay_decoder(vae.decoder)


def _lay_encoder(encoder: Any) -> None:
    opponent = torch.tensor(_OPPONENT_OF_RGB)
    first = _clear(encoder.conv_in)
    first[:_NUM_COLORS, :, 1, 1] = opponent
    first[_MINUS[0] : _MINUS[0] + _NUM_COLORS, :, 1, 1] = -opponent
    for number in range(3):
        weight = _clear(encoder.down_blocks[number].downsamplers[0].conv)
        for signs in (_PLUS, _MINUS):
            # Taps 0 and 1 of a stride-2 kernel average a 2 × 2 block and never touch the padding.
            for channel in signs[:_NUM_COLORS]:
                weight[channel, channel, :2, :2] = 0.25
            if number == 2:
                # One tap further lie the blocks shifted by half their size.
                weight[signs[_DETAIL], signs[_LUMA], 1:, 1:] = 0.25

    last = _clear(encoder.conv_out, num_outputs=8, carrier=False)
    unnormalized = _scale_of_normalization()
    for sign, signs in ((1, _PLUS), (-1, _MINUS)):
        for channel in range(_NUM_COLORS):
            last[channel, signs[channel], 1, 1] = sign * unnormalized
        detail = sign * _DETAIL_GAIN * unnormalized
        last[_DETAIL, signs[_DETAIL], 1, 1] = detail
        last[_DETAIL, signs[_LUMA], 1:, 1:] = -detail / 4
    encoder.conv_out.bias[4:] = _INITIAL_LOGVAR


def _lay_decoder(decoder: Any) -> None:
    first = _clear(decoder.conv_in)
    for sign, signs in ((1, _PLUS), (-1, _MINUS)):
        for latent, channel in enumerate(signs):
            first[channel, latent, 1, 1] = sign / (_DETAIL_GAIN if latent == _DETAIL else 1)
    for number in range(3):
        weight = _clear(decoder.up_blocks[number].upsamplers[0].conv)
        for signs in (_PLUS, _MINUS):
            for channel in signs[:_NUM_COLORS]:
                weight[channel, channel] = _BINOMIAL[:, None] * _BINOMIAL
            if number == 0:
                # The tap up and left undoes the half-block shift of the detail's grid.
                weight[signs[_LUMA], signs[_DETAIL], 0, 0] = 0.5

    last = _clear(decoder.conv_out, num_outputs=3, carrier=False)
    to_rgb = torch.linalg.inv(torch.tensor(_OPPONENT_OF_RGB)) * _scale_of_normalization()
    last[:, :_NUM_COLORS, 1, 1] = to_rgb
    last[:, _MINUS[0] : _MINUS[0] + _NUM_COLORS, 1, 1] = -to_rgb


def _clear(
    convolution: nn.Conv2d, num_outputs: int = _NUM_LAID, *, carrier: bool = True
) -> torch.Tensor:
    """Zero the laid output channels and all biases, set the constant pair, return the weight."""
    bias = cast("torch.Tensor", convolution.bias)
    convolution.weight[:num_outputs] = 0
    bias.zero_()
    if carrier:
        bias[_CARRIER_PLUS], bias[_CARRIER_MINUS] = _CARRIER_LEVEL, -_CARRIER_LEVEL
    return convolution.weight


def _scale_of_normalization() -> float:
    """Return what a normalisation divides by when the constant pair is all there is."""
    return _CARRIER_LEVEL * (2 / WIDTH) ** 0.5
