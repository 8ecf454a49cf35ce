"""The noise schedule ᾱ of a checkpoint and the one function that noises latents.

Betas and ᾱ are float64; a checkpoint's own scheduler is never asked to add noise, since some
of them (Euler's) work on another scale than the UNet was trained on.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from sdxl_distill.errors import IncompatibleError

PredictionType = Literal["epsilon", "v_prediction", "sample"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
_MAX_COSINE_BETA = 0.999


@dataclass(frozen=True)
class NoiseSchedule:
    """How much noise each timestep stands for, and what the UNet predicts."""

    prediction_type: PredictionType = "epsilon"
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("prediction_type", PredictionType), ("beta_schedule", BetaSchedule)):
            if getattr(self, name) not in get_args(kind):
                raise IncompatibleError(
                    f"{name} {getattr(self, name)!r}",
                    expected=" | ".join(get_args(kind)),
                    where="noise schedule",
                    action="use a checkpoint whose scheduler_config.json names one of these",
                )
        if self.num_train_timesteps < 1:
            raise IncompatibleError(
                f"num_train_timesteps {self.num_train_timesteps}",
                expected="at least 1",
                where="noise schedule",
            )
        if self.zero_terminal_snr and not self._can_be_rescaled():
            raise IncompatibleError(
                f"{self.num_train_timesteps} betas from {self.beta_start} to {self.beta_end} "
                "cannot be rescaled to end in pure noise",
                expected="at least two different values of ᾱ, all above 0",
                where="noise schedule",
                action="set teacher.zero_terminal_snr: false, or use another checkpoint",
            )

    def _can_be_rescaled(self) -> bool:
        with np.errstate(divide="ignore", invalid="ignore"):
            return bool(np.isfinite(self.betas()).all())

    def betas(self) -> npt.NDArray[np.float64]:
        """Return β of every training timestep, float64 [T].

        linear: Ho et al. 2020 (DDPM) §4; scaled_linear: linear in √β, Rombach et al. 2022;
        squaredcos_cap_v2: Nichol & Dhariwal 2021, eq. 17.
        """
        num_steps = self.num_train_timesteps
        if self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, num_steps)
        elif self.beta_schedule == "scaled_linear":
            roots = np.linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), num_steps)
            betas = np.square(roots)
        else:
            edges = [_cosine_alpha_bar(step / num_steps) for step in range(num_steps + 1)]
            betas = np.minimum(1 - np.divide(edges[1:], edges[:-1]), _MAX_COSINE_BETA)
        return _rescale_to_zero_terminal_snr(betas) if self.zero_terminal_snr else betas

    def alphas_cumprod(self) -> npt.NDArray[np.float64]:
        """Return ᾱ of every training timestep, float64 [T]: ᾱ_t = Π_{s ≤ t} (1 - β_s)."""
        return np.cumprod(1.0 - self.betas(), dtype=np.float64)

    def table_fingerprint(self) -> str:
        """Return the SHA-256 of ᾱ rounded to float32: what joined sets must share.

        Rounded, because the last bits of a power differ between C libraries.
        """
        table = self.alphas_cumprod().astype("<f4")
        return hashlib.sha256(table.tobytes()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, for manifests."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> NoiseSchedule:
        """Build from what `to_json` returned.

        Raises:
            IncompatibleError: for an unknown field or an unknown value.
        """
        unknown = fields.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            raise IncompatibleError(
                f"unknown fields {sorted(unknown)}",
                expected=f"only {sorted(cls.__dataclass_fields__)}",
                where="noise schedule",
                action="use a version of sdxl_distill at least as new as the one that wrote it",
            )
        return cls(**fields)


def _cosine_alpha_bar(fraction: float) -> float:
    return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2


def _rescale_to_zero_terminal_snr(
    betas: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Shift and scale √ᾱ so that the last one is zero (Lin et al. 2023, algorithm 1)."""
    roots = np.sqrt(np.cumprod(1.0 - betas))
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    alphas_cumprod = roots**2
    alphas = np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1.0 - alphas


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, alpha_cumprod: torch.Tensor
) -> torch.Tensor:
    """Return noisy latents √ᾱ·latents + √(1-ᾱ)·noise, float32 (DDPM, eq. 4).

    Args:
        latents: scaled VAE latents [B, C, h, w], float16 as stored.
        noise: standard normal [B, C, h, w], float16 as stored.
        alpha_cumprod: ᾱ at each record's timestep, float64 [B].
    """
    alpha = alpha_cumprod.to(torch.float64)
    signal = alpha.sqrt().to(torch.float32).view(-1, 1, 1, 1)
    deviation = (1.0 - alpha).sqrt().to(torch.float32).view(-1, 1, 1, 1)
    return signal * latents.to(torch.float32) + deviation * noise.to(torch.float32)
