"""Seeds, timesteps and noise: golden values, distribution, independence of the draws."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from sdxl_distill.core.image_id import image_id
from sdxl_distill.core.noise import noise, noise_seed, timestep, uniform

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "noise.json").read_text())


def ids(count: int) -> list[str]:
    return [image_id(str(number).encode()) for number in range(count)]


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['width']}x{row['height']}")
def test_seed_timestep_and_noise_are_those_of_the_golden_file(row: dict) -> None:
    seed = noise_seed(row["image_id"], row["base_seed"], row["draw"])
    assert seed == row["seed"]
    assert uniform(seed).hex() == row["uniform"]
    assert timestep(row["image_id"], row["base_seed"], row["draw"], 0, 1000) == row["timestep"]
    sample = noise(seed, row["width"], row["height"])
    assert sample.dtype == np.float16
    assert hashlib.sha256(sample.tobytes()).hexdigest() == row["noise_sha256"]


@given(st.integers(0, 2**32 - 1))
def test_uniform_has_the_first_bits_of_the_philox_of_numpy(seed: int) -> None:
    bits = int(np.random.Philox(key=seed).random_raw())
    assert uniform(seed) == (bits >> 11) / 2**53


def test_first_draw_hashes_id_and_base_seed_alone() -> None:
    identity = image_id(b"photo")
    digest = hashlib.sha256(f"{identity}|42".encode()).digest()
    assert noise_seed(identity, 42) == int.from_bytes(digest[:4], "big")
    later = hashlib.sha256(f"{identity}|42|3".encode()).digest()
    assert noise_seed(identity, 42, 3) == int.from_bytes(later[:4], "big")


def test_timesteps_are_uniform_over_images() -> None:
    drawn = [timestep(identity, 42, 0, 100, 900) for identity in ids(8000)]
    assert min(drawn) == 100
    assert max(drawn) == 899
    counts = np.histogram(drawn, bins=8, range=(100, 900))[0]
    chi_squared = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_squared < 24.3  # 99.9 % of a chi-squared with 7 degrees of freedom


def test_draws_of_one_image_are_spread_evenly() -> None:
    for identity in ids(50):
        drawn = sorted(timestep(identity, 42, draw, 0, 1000) for draw in range(16))
        gaps = np.diff([*drawn, drawn[0] + 1000])
        assert gaps.max() <= 105  # random draws leave gaps of about 200


def test_noise_is_standard_normal() -> None:
    sample = noise(7, 1024, 1024).astype(np.float64)
    assert sample.shape == (4, 128, 128)
    assert abs(sample.mean()) < 0.016
    assert abs(sample.std() - 1) < 0.012


def test_noise_of_other_draws_and_images_is_unrelated() -> None:
    first, second = ids(2)
    base = noise(noise_seed(first, 42), 512, 512).ravel().astype(np.float64)
    for other in (noise_seed(second, 42), noise_seed(first, 42, 1), noise_seed(first, 43)):
        correlation = np.corrcoef(base, noise(other, 512, 512).ravel().astype(np.float64))[0, 1]
        assert abs(correlation) < 0.03


def test_width_is_the_last_axis() -> None:
    assert noise(1, 160, 96).shape == (4, 12, 20)
