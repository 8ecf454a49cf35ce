from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from sdxl_distill.errors import IncompatibleError, NumericalError
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.vae import decode_latents, encode_images, latent_channels, load_vae

pytestmark = pytest.mark.processors


@pytest.fixture(scope="module")
def checkpoint(tiny_family):
    return ModelFolder.resolve(str(tiny_family.base))


@pytest.fixture(scope="module")
def vae(checkpoint):
    return load_vae(checkpoint, torch.float32, "cpu")


@pytest.fixture(scope="module")
def diffusers_vae(tiny_family):
    return AutoencoderKL.from_pretrained(tiny_family.base / "vae")


@pytest.fixture(scope="module")
def pixels():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 32, 64, 3), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def test_latents_are_the_scaled_means_of_diffusers(vae, diffusers_vae, pixels):
    images = VaeImageProcessor().preprocess([Image.fromarray(image.numpy()) for image in pixels])
    theirs = diffusers_vae.encode(images).latent_dist.mean * diffusers_vae.config.scaling_factor
    ours = encode_images(vae, pixels)
    assert ours.shape == (2, 4, 4, 8)
    assert torch.equal(ours, theirs.half())


def test_encoding_draws_nothing(vae, pixels):
    before = torch.get_rng_state()
    assert torch.equal(encode_images(vae, pixels), encode_images(vae, pixels))
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16_latents_are_close_to_float32(checkpoint, vae, pixels):
    exact = encode_images(vae, pixels).float()
    rounded = encode_images(load_vae(checkpoint, torch.bfloat16, "cpu"), pixels).float()
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() / exact.norm() < 0.03


@torch.no_grad()
def test_decoded_pixels_are_those_of_the_pipeline(vae, diffusers_vae, pixels):
    latents = encode_images(vae, pixels)
    images = diffusers_vae.decode(latents.float() / diffusers_vae.config.scaling_factor).sample
    theirs = VaeImageProcessor().postprocess(images, output_type="np")
    assert isinstance(theirs, np.ndarray)
    ours = decode_latents(vae, latents)
    assert ours.dtype == torch.uint8
    assert np.array_equal(ours.numpy(), (theirs * 255).round().astype(np.uint8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_latents_beyond_float16_name_the_image_of_the_batch(checkpoint, pixels, value):
    vae = load_vae(checkpoint, torch.float32, "cpu")
    assert vae.quant_conv is not None
    vae.quant_conv.register_forward_hook(
        lambda _module, _args, output: output.index_fill(0, torch.tensor([1]), value)
    )
    with pytest.raises(NumericalError, match=r"images \[1\]"):
        encode_images(vae, pixels)


def test_float16_is_never_used(checkpoint):
    with pytest.raises(AssertionError):
        load_vae(checkpoint, torch.float16, "cpu")


def test_latent_channels_are_those_of_the_loaded_vae(checkpoint, vae):
    assert latent_channels(checkpoint) == vae.post_quant_conv.in_channels


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latents_mean": [0.1, 0.2, 0.3, 0.4]}, "latents_mean"),
        ({"latents_std": [1.0, 1.0, 1.0, 1.0]}, "latents_std"),
        ({"shift_factor": 0.1159}, "shift_factor"),
        ({"block_out_channels": [12, 12, 12]}, "8 times"),
        ({"scaling_factor": None}, "scaling_factor None"),
        ({"latent_channels": "four"}, "latent_channels"),
    ],
)
def test_another_kind_of_vae_is_incompatible(folder, fields, message):
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(IncompatibleError, match=message):
        load_vae(ModelFolder.resolve(str(folder)), torch.float32, "cpu")
