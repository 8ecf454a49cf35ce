"""ᾱ tables and the noising of latents, against diffusers' schedulers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from hypothesis import given, strategies as st

from sdxl_distill.core.noise_schedule import NoiseSchedule, add_noise
from sdxl_distill.errors import IncompatibleError

pytestmark = pytest.mark.processors

SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_alphas_cumprod_equal_diffusers(beta_schedule: str, zero_terminal_snr: bool) -> None:
    oracle = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=beta_schedule,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    ours = NoiseSchedule(beta_schedule=beta_schedule, zero_terminal_snr=zero_terminal_snr)
    np.testing.assert_allclose(
        ours.alphas_cumprod(), oracle.alphas_cumprod.numpy(), rtol=2e-5, atol=2e-7
    )


def test_zero_terminal_snr_ends_at_zero_and_keeps_the_start() -> None:
    plain = NoiseSchedule().alphas_cumprod()
    rescaled = NoiseSchedule(zero_terminal_snr=True).alphas_cumprod()
    assert rescaled[-1] == 0
    assert rescaled[0] == pytest.approx(plain[0], rel=1e-12)
    # docs/determinism.md: such teachers cannot be averaged with plain ones
    assert plain[900] ** 0.5 == pytest.approx(0.119, abs=1e-3)
    assert rescaled[900] ** 0.5 == pytest.approx(0.054, abs=1e-3)


@given(step=st.integers(0, 999), seed=st.integers(0, 2**31))
def test_noisy_latents_equal_ddpm_from_the_same_float16(step: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 3, 5, generator=generator).half()
    noise = torch.randn(2, 4, 3, 5, generator=generator).half()
    alphas = torch.from_numpy(NoiseSchedule().alphas_cumprod())[[step, step]]
    oracle = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    expected = oracle.add_noise(latents.float(), noise.float(), torch.tensor([step, step]))
    torch.testing.assert_close(add_noise(latents, noise, alphas), expected, rtol=1e-4, atol=1e-5)


# diffusers 0.42 hands a torch tensor to np.array
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_noisy_latents_have_unit_scale_where_eulers_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 64, 64, generator=generator)
    noise = torch.randn(1, 4, 64, 64, generator=generator)
    alphas = torch.from_numpy(NoiseSchedule().alphas_cumprod())[[801]]
    assert float(add_noise(latents, noise, alphas).std()) == pytest.approx(1, abs=0.03)
    euler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    euler.set_timesteps(1000)
    assert float(euler.add_noise(latents, noise, torch.tensor([801.0])).std()) > 4


def test_table_fingerprint_tells_tables_apart_but_not_prediction_types() -> None:
    plain = NoiseSchedule().table_fingerprint()
    assert NoiseSchedule(prediction_type="v_prediction").table_fingerprint() == plain
    assert NoiseSchedule(zero_terminal_snr=True).table_fingerprint() != plain


def test_json_round_trips_and_refuses_unknown_fields() -> None:
    schedule = NoiseSchedule(prediction_type="v_prediction", zero_terminal_snr=True)
    assert NoiseSchedule.from_json(schedule.to_json()) == schedule
    with pytest.raises(IncompatibleError, match="sigma_data"):
        NoiseSchedule.from_json({**schedule.to_json(), "sigma_data": 0.5})


@pytest.mark.parametrize(
    "field", [{"prediction_type": "flow"}, {"beta_schedule": "sigmoid"}, {"num_train_timesteps": 0}]
)
def test_unknown_values_are_refused(field: dict) -> None:
    with pytest.raises(IncompatibleError, match=next(iter(field))):
        NoiseSchedule(**field)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_train_timesteps": 1},
        {"beta_start": 0.0, "beta_end": 0.0},
        {"beta_start": 0.9, "beta_end": 0.99, "beta_schedule": "linear"},
    ],
)
def test_betas_that_cannot_end_in_pure_noise_are_refused(fields) -> None:
    NoiseSchedule(**fields)
    with pytest.raises(IncompatibleError, match="cannot be rescaled"):
        NoiseSchedule(**fields, zero_terminal_snr=True)
