from __future__ import annotations

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from sdxl_distill.demo.curves import Curve, read_curves
from sdxl_distill.errors import ConfigError


def test_curves_are_what_tensorboard_wrote(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(1, 6):
            writer.add_scalar("distill/loss", 1 / step, step)
        writer.add_scalar("distill/validation/loss", 7.0, 5)
    curves = read_curves(tmp_path)
    assert curves.keys() == {"distill/loss", "distill/validation/loss"}
    assert curves["distill/loss"].steps.tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(curves["distill/loss"].values, 1 / np.arange(1, 6), rtol=1e-6)


def test_steps_that_a_resumed_run_repeats_are_read_once(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(1, 6):
            writer.add_scalar("distill/loss", 1.0, step)
    with SummaryWriter(str(tmp_path), purge_step=4, filename_suffix=".resumed") as writer:
        for step in range(4, 8):
            writer.add_scalar("distill/loss", 2.0, step)
    curve = read_curves(tmp_path)["distill/loss"]
    assert curve.steps.tolist() == list(range(1, 8))
    assert curve.values.tolist() == [1, 1, 1, 2, 2, 2, 2]


def test_a_folder_without_events_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no scalars") as caught:
        read_curves(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_smoothing_keeps_a_constant_from_its_first_value():
    curve = Curve(np.arange(4), np.full(4, 3.0))
    np.testing.assert_allclose(curve.smoothed(), 3.0)


def test_smoothing_damps_noise():
    # An average that keeps k of the last has √((1 - k) / (1 + k)) of the deviation: 0.5 at 0.6.
    noise = np.random.Generator(np.random.Philox(0)).standard_normal(400)
    assert Curve(np.arange(400), noise).smoothed()[100:].std() < 0.6
