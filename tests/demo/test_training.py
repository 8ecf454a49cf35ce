from __future__ import annotations

import pytest
import torch

from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.demo.encoded_photos import read_photos
from sdxl_distill.demo.evaluation import encode_folder
from sdxl_distill.demo.tiny_unet import new_unet
from sdxl_distill.demo.tiny_vae import draw_pyramid, new_vae
from sdxl_distill.demo.training import spread_timesteps, train_unet, train_vae
from sdxl_distill.demo.weights import draw_weights

pytestmark = pytest.mark.processors


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_spread_timesteps_fall_once_in_every_part_of_the_schedule():
    timesteps = spread_timesteps(8, 1000, _generator())
    assert (timesteps // 125).tolist() == list(range(8))


def test_spread_timesteps_reach_every_timestep_and_no_other():
    generator = _generator()
    seen = {int(t) for _ in range(400) for t in spread_timesteps(4, 20, generator)}
    assert seen == set(range(20))


@pytest.fixture(scope="module")
def photos(photo_folders):
    return read_photos(photo_folders.held_out)


def test_vae_training_improves_the_pyramid_and_scales_latents_to_unit_variance(photos):
    vae = new_vae()
    draw_pyramid(vae, _generator())
    losses = []
    train_vae(vae, photos, 16, 1e-3, _generator(), lambda _, loss: losses.append(loss))
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    with torch.no_grad():
        latents = [
            vae.encode(each.pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode().flatten()
            for each in photos
        ]
    scaled = torch.cat(latents) * vae.config["scaling_factor"]
    torch.testing.assert_close(scaled.std(), torch.tensor(1.0))


def test_unet_training_learns_to_predict_noise(photo_folders, tiny_family):
    encoded = encode_folder(photo_folders.held_out, tiny_family.base)
    unet = new_unet((16, 32, 32))
    draw_weights(unet, _generator())
    losses = []
    train_unet(
        unet, encoded, NoiseSchedule(), 40, 4e-3, _generator(), lambda _, loss: losses.append(loss)
    )
    assert len(losses) == 40
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])
