"""The three directions in which the demo's teachers are fine-tuned: sepia, night and vivid.

Each look maps pixels [N, 3, H, W] float32 in 0 … 1 to the same shape and range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_SEPIA_LIGHT = (1.0, 0.86, 0.62)
_SEPIA_DARK = (0.20, 0.11, 0.05)
_NIGHT_TINT = (0.20, 0.36, 0.85)


def sepia(pixels: torch.Tensor) -> torch.Tensor:
    """Return a brown-toned monochrome print."""
    light, dark = _color(_SEPIA_LIGHT, pixels), _color(_SEPIA_DARK, pixels)
    return (dark + (light - dark) * _luma(pixels)).clamp(0, 1)


def night(pixels: torch.Tensor) -> torch.Tensor:
    """Return moonlight: darker, less colour, blue."""
    muted = 0.7 * _luma(pixels) + 0.3 * pixels
    return (muted.pow(1.4) * _color(_NIGHT_TINT, pixels)).clamp(0, 1)


def vivid(pixels: torch.Tensor) -> torch.Tensor:
    """Return stronger colours and contrast."""
    grey = _luma(pixels)
    saturated = grey + 2.2 * (pixels - grey)
    return (0.5 + 1.35 * (saturated - 0.5)).clamp(0, 1)


LOOKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sepia": sepia,
    "night": night,
    "vivid": vivid,
}
"""Teacher id → the look of its training photos."""


def _luma(pixels: torch.Tensor) -> torch.Tensor:
    """Return brightness [N, 1, H, W]."""
    return (pixels * _color(_LUMA, pixels)).sum(dim=1, keepdim=True)


def _color(rgb: tuple[float, float, float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(rgb, dtype=like.dtype, device=like.device).view(1, 3, 1, 1)
