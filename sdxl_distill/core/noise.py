"""Noise and timestep of an image: pure functions of (image id, base seed, draw).

Every teacher therefore gets the same input, which need not be stored. The bits come from numpy's
Philox, whose stream numpy promises to keep; see docs/determinism.md.
"""

from __future__ import annotations

import hashlib
import math
from typing import Final

import numpy as np
import numpy.typing as npt

NOISE_ALGORITHM: Final = "philox-ziggurat64-1"
LATENT_DOWNSCALE: Final = 8  # pixels of an image per latent along each side

_TIMESTEP_STREAM: Final = 0
_NOISE_STREAM: Final = 1
CAPTION_STREAM: Final = 2  # kept free for a choice among several captions
_GOLDEN_RATIO_FRACTION: Final = 0.6180339887498949
_64_BITS: Final = (1 << 64) - 1


def noise_seed(image_id: str, base_seed: int, draw: int = 0) -> int:
    """Return the 32-bit seed of one draw of an image.

    The first 4 bytes, big-endian, of SHA-256 of `"{image_id}|{base_seed}"`, with `"|{draw}"`
    appended for draws after the first. Two images may share a seed; that does no harm.
    """
    identity = f"{image_id}|{base_seed}" + (f"|{draw}" if draw else "")
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:4], "big")


def _first_bits(seed: int) -> int:
    """Return the first 64 bits of the timestep stream, as numpy's Philox does in twice the time.

    Philox4x64-10 of the counter 1: Salmon et al. 2011, "Parallel random numbers: as easy as
    1, 2, 3". Each record that is read needs one; numpy would ask the system for entropy first.
    """
    a, b, c, d = 1, 0, 0, 0
    key, other_key = seed, _TIMESTEP_STREAM
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, c = (high >> 64) ^ b ^ key, (low >> 64) ^ d ^ other_key
        b, d = high & _64_BITS, low & _64_BITS
        key = (key + 0x9E3779B97F4A7C15) & _64_BITS
        other_key = (other_key + 0xBB67AE8584CAA73B) & _64_BITS
    return a


def uniform(seed: int) -> float:
    """Return the number in [0, 1) that determines an image's timesteps, with 53 bits."""
    return (_first_bits(seed) >> 11) * 2.0**-53


def timestep(image_id: str, base_seed: int, draw: int, min_timestep: int, max_timestep: int) -> int:
    """Return the timestep of one draw, in [min_timestep, max_timestep).

    Uniform over images. Over the draws of one image the golden-ratio sequence (an additive
    recurrence, Weyl 1916) covers the range with the least discrepancy at every length.
    """
    start = uniform(noise_seed(image_id, base_seed))
    fraction = math.modf(start + draw * _GOLDEN_RATIO_FRACTION)[0]
    return min_timestep + math.floor((max_timestep - min_timestep) * fraction)


def noise(
    seed: int, width_px: int, height_px: int, num_channels: int = 4
) -> npt.NDArray[np.float16]:
    """Return standard normal noise for the latents of an image, float16 [C, H/8, W/8].

    Drawn in float64 and then rounded: no two builds of numpy that we know of differ in the last
    bits of a float64 ziggurat, and float16 would hide it if they did.
    """
    shape = (num_channels, height_px // LATENT_DOWNSCALE, width_px // LATENT_DOWNSCALE)
    generator = np.random.Generator(np.random.Philox(key=seed + (_NOISE_STREAM << 64)))
    return generator.standard_normal(shape).astype(np.float16)
