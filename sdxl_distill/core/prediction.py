"""Exact conversion between what UNets may predict: epsilon, v_prediction, sample.

With x the latents, ε the noise, z the noisy latents, a = √ᾱ, s = √(1-ᾱ):
z = a·x + s·ε and v = a·ε - s·x (Salimans & Ho 2022, appendix D).
"""

from __future__ import annotations

from typing import Final

import torch

from sdxl_distill.core.noise_schedule import PredictionType

# Below this √ᾱ a division by it multiplies the squared error of epsilon by more than 400.
MIN_SIGNAL: Final = 0.05
"""Smallest √ᾱ at which an epsilon prediction is converted."""


def convert_prediction(
    prediction: torch.Tensor,
    noisy_latents: torch.Tensor,
    alpha_cumprod: torch.Tensor,
    source_type: PredictionType,
    target_type: PredictionType,
) -> torch.Tensor:
    """Express a prediction as another prediction type, float32 [B, C, h, w].

    Of a signal below `MIN_SIGNAL` epsilon tells too little: callers refuse such timesteps before,
    as a run does when it starts. To look here would wait for the device at every step.

    Args:
        prediction: UNet output of `source_type` [B, C, h, w].
        noisy_latents: the UNet's input [B, C, h, w].
        alpha_cumprod: ᾱ at each record's timestep, float64 [B].
        source_type: the type of `prediction`.
        target_type: the type to return.
    """
    prediction = prediction.to(torch.float32)
    if source_type == target_type:
        return prediction
    noisy = noisy_latents.to(torch.float32)
    alpha = alpha_cumprod.to(torch.float64)
    signal = alpha.sqrt().to(torch.float32).view(-1, 1, 1, 1)
    deviation = (1.0 - alpha).sqrt().to(torch.float32).view(-1, 1, 1, 1)
    # From epsilon, where the signal is strong enough: x = (z - s·ε) / a, v = (ε - s·z) / a.
    if source_type == "epsilon":
        latents = (noisy - deviation * prediction) / signal
        return latents if target_type == "sample" else (prediction - deviation * noisy) / signal
    # From v: ε = a·v + s·z, x = a·z - s·v.
    if source_type == "v_prediction":
        if target_type == "epsilon":
            return signal * prediction + deviation * noisy
        return signal * noisy - deviation * prediction
    # From the sample: ε = (z - a·x) / s, v = (a·z - x) / s.
    if target_type == "epsilon":
        return (noisy - signal * prediction) / deviation
    return (signal * noisy - prediction) / deviation
