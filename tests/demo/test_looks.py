from __future__ import annotations

import pytest
import torch

from sdxl_distill.demo.looks import LOOKS, night, sepia, vivid


@pytest.fixture
def pixels():
    return torch.rand(4, 3, 16, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_look_keeps_shape_and_range(look, pixels):
    changed = look(pixels)
    assert changed.shape == pixels.shape
    assert changed.min() >= 0 and changed.max() <= 1


def test_sepia_leaves_one_hue_from_dark_brown_to_cream(pixels):
    red, green, blue = sepia(pixels).unbind(dim=1)
    assert (red > green).all() and (green > blue).all()


def test_sepia_forgets_color_and_keeps_brightness():
    grey = torch.full((1, 3, 1, 1), 0.587)
    green = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(sepia(green), sepia(grey))


def test_night_is_darker_and_bluer(pixels):
    changed = night(pixels).mean(dim=(0, 2, 3))
    assert changed.sum() < 0.5 * pixels.mean(dim=(0, 2, 3)).sum()
    assert changed[2] > 2 * changed[0]


def test_vivid_raises_saturation(pixels):
    muted = 0.35 + 0.3 * pixels
    spread = muted.amax(dim=1) - muted.amin(dim=1)
    changed = vivid(muted)
    assert ((changed.amax(dim=1) - changed.amin(dim=1)) > 1.5 * spread).all()
