"""Conversions between prediction types, against the definition and diffusers."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import DDPMScheduler

from sdxl_distill.core.noise_schedule import NoiseSchedule, add_noise
from sdxl_distill.core.prediction import convert_prediction

pytestmark = pytest.mark.processors

TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEPS = torch.tensor([0, 10, 400, 700, 980])


@pytest.fixture
def parts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(5, 4, 6, 4, generator=generator)
    noise = torch.randn(5, 4, 6, 4, generator=generator)
    alphas = torch.from_numpy(NoiseSchedule().alphas_cumprod())[TIMESTEPS]
    oracle = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": oracle.get_velocity(latents, noise, TIMESTEPS),
        "noisy": add_noise(latents, noise, alphas),
        "alphas": alphas,
    }


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(TYPES, 2)))
def test_conversion_maps_the_truth_to_the_truth(
    parts: dict[str, torch.Tensor], source: str, target: str
) -> None:
    converted = convert_prediction(parts[source], parts["noisy"], parts["alphas"], source, target)
    tolerance = 3e-3 if source == "sample" and target != "sample" else 2e-4
    torch.testing.assert_close(converted, parts[target], rtol=1e-3, atol=tolerance)


def test_same_type_is_untouched(parts: dict[str, torch.Tensor]) -> None:
    half = parts["epsilon"].half()
    same = convert_prediction(half, parts["noisy"], parts["alphas"], "epsilon", "epsilon")
    assert torch.equal(same, half.float())


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(TYPES, 2)))
def test_a_conversion_reads_nothing_back_to_the_host(source: str, target: str) -> None:
    # A tensor on the meta device has no values: whatever asks for one raises.
    tensor = torch.empty(2, 4, 2, 2, device="meta")
    alphas = torch.empty(2, dtype=torch.float64, device="meta")
    assert convert_prediction(tensor, tensor, alphas, source, target).shape == tensor.shape
