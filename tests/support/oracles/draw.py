"""Seed, timestep and noise of an image as docs/determinism.md states them; hashlib and numpy."""

from __future__ import annotations

import hashlib
import math

import numpy as np

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def image_id_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def seed_of(image_id: str, base_seed: int, draw: int) -> int:
    text = f"{image_id}|{base_seed}" if draw == 0 else f"{image_id}|{base_seed}|{draw}"
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def timestep_of(image_id: str, base_seed: int, draw: int, first: int, end: int) -> int:
    bits = np.random.Philox(key=seed_of(image_id, base_seed, 0)).random_raw() >> 11
    fraction = (bits / 2**53 + draw * GOLDEN_RATIO) % 1.0
    return first + int((end - first) * fraction)


def noise_of(seed: int, width: int, height: int) -> np.ndarray:
    bits = np.random.Philox(key=seed + 2**64)
    shape = (4, height // 8, width // 8)
    return np.random.Generator(bits).standard_normal(shape).astype(np.float16)
