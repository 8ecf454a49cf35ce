from __future__ import annotations

import pytest
import torch
from torch import nn

from sdxl_distill.core.noise_schedule import NoiseSchedule, add_noise
from sdxl_distill.demo.evaluation import encode_folder
from sdxl_distill.demo.photo_grid import denoise, denoise_photos

pytestmark = pytest.mark.processors

START = 500


class KnowingUnet(nn.Module):
    """Predicts exactly, because it knows the latents."""

    def __init__(self, latents: torch.Tensor, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.latents = nn.Parameter(latents)
        self.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod())
        self.prediction_type = schedule.prediction_type

    def forward(self, noisy_latents, timesteps, **_conditioning):
        alpha = self.alphas_cumprod[timesteps].float().view(-1, 1, 1, 1)
        noise = (noisy_latents - alpha.sqrt() * self.latents) / (1 - alpha).sqrt()
        if self.prediction_type == "epsilon":
            return (noise,)
        return (alpha.sqrt() * noise - (1 - alpha).sqrt() * self.latents,)


@pytest.fixture(scope="module")
def encoded(photo_folders, tiny_family):
    return encode_folder(photo_folders.held_out, tiny_family.base)[0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_unet_that_knows_the_photo_restores_it(encoded, prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    unet = KnowingUnet(encoded.latents, schedule)
    noise = torch.randn(encoded.latents.shape, generator=torch.Generator().manual_seed(0))
    alpha = unet.alphas_cumprod[START].expand(len(encoded))
    noisy_latents = add_noise(encoded.latents, noise, alpha)
    restored = denoise(encoded, noisy_latents, [unet], [1.0], schedule, START)
    torch.testing.assert_close(restored, encoded.latents, atol=1e-4, rtol=1e-4)


def test_two_teachers_average_is_between_them(encoded):
    schedule = NoiseSchedule()
    bright, dark = (KnowingUnet(encoded.latents + shift, schedule) for shift in (1.0, -1.0))
    noisy_latents = torch.randn(encoded.latents.shape, generator=torch.Generator().manual_seed(0))
    restored = denoise(encoded, noisy_latents, [bright, dark], [0.75, 0.25], schedule, START)
    torch.testing.assert_close(restored, encoded.latents + 0.5, atol=1e-3, rtol=1e-3)


def test_a_grid_has_one_row_per_photo_and_one_column_per_model(photo_folders, tiny_family):
    grid = denoise_photos(
        photo_folders.held_out,
        tiny_family.base,
        tiny_family.teachers,
        tiny_family.base,
        [1 / 3] * 3,
    )
    assert grid.columns == (
        "photo",
        "through the VAE",
        "noised",
        "base",
        "teacher_a",
        "teacher_b",
        "teacher_c",
        "teachers' average",
        "student",
    )
    assert [len(row) for row in grid.rows] == [9, 9, 9]
    for row in grid.rows:
        assert {tile.shape for tile in row} == {(96, 128, 3)}
        # Here the student is the base; the teachers are not.
        assert (row[-1] == row[3]).all() and (row[4] != row[3]).any()
