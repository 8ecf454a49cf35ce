from __future__ import annotations

import pytest
import torch

from sdxl_distill.demo.encoded_photos import read_photos
from sdxl_distill.demo.tiny_vae import draw_pyramid, new_vae

pytestmark = pytest.mark.processors


@pytest.fixture(scope="module")
def vae():
    vae = new_vae()
    draw_pyramid(vae, torch.Generator().manual_seed(0))
    return vae.eval()


@pytest.fixture(scope="module")
def pixels(photo_folders):
    photos = read_photos(photo_folders.held_out)[0]
    return photos.pixels.permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def _reconstruct(vae, pixels):
    return vae.decode(vae.encode(pixels).latent_dist.mode()).sample


def _psnr(left, right):
    return -10 * torch.log10((left - right).square().mean() / 4)


def test_pyramid_reconstructs_photos_before_any_training(vae, pixels):
    assert _psnr(_reconstruct(vae, pixels).clamp(-1, 1), pixels) > 16


def test_pyramid_keeps_brightness_and_color_away_from_the_border(vae):
    color = torch.tensor([0.5, -0.2, 0.1]).view(1, 3, 1, 1).expand(1, 3, 128, 128)
    middle = _reconstruct(vae, color)[..., 48:80, 48:80]
    torch.testing.assert_close(middle, color[..., 48:80, 48:80], atol=0.08, rtol=0)


def test_latents_have_an_eighth_of_the_size(vae):
    with torch.no_grad():
        latents = vae.encode(torch.zeros(2, 3, 96, 160)).latent_dist.mode()
    assert latents.shape == (2, 4, 12, 20)


def test_every_latent_channel_carries_signal(vae, pixels):
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
    spread = latents.std(dim=(0, 2, 3))
    assert spread.min() > 0.2 * spread.max()
