"""Golden seeds, timesteps and noise; a change of any of them is a breaking change."""

from __future__ import annotations

import hashlib
from typing import Any

from sdxl_distill.core.image_id import image_id
from sdxl_distill.core.noise import noise, noise_seed, timestep, uniform

CASES = ((0, 1024, 1024, 0), (1, 896, 1152, 0), (2, 160, 96, 1), (3, 64, 64, 7))


def build() -> list[dict[str, Any]]:
    """Compute one row per case."""
    rows = []
    for number, width, height, draw in CASES:
        identity = image_id(f"golden image {number}".encode())
        seed = noise_seed(identity, 42, draw)
        rows.append(
            {
                "image_id": identity,
                "base_seed": 42,
                "draw": draw,
                "width": width,
                "height": height,
                "seed": seed,
                "uniform": uniform(seed).hex(),
                "timestep": timestep(identity, 42, draw, 0, 1000),
                "noise_sha256": hashlib.sha256(noise(seed, width, height).tobytes()).hexdigest(),
            }
        )
    return rows
