"""The curves of a training run, read from its TensorBoard event files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdxl_distill.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

_KEPT = 0.6


@dataclass(frozen=True)
class Curve:
    """Scalars of one tag.

    Attributes:
        steps: the steps, int64 [N].
        values: the value at each step, float64 [N].
    """

    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]

    def smoothed(self) -> npt.NDArray[np.float64]:
        """Return the exponential moving average, corrected at its start, as TensorBoard does."""
        average, averages = 0.0, []
        for count, value in enumerate(self.values.tolist(), start=1):
            average = _KEPT * average + (1 - _KEPT) * value
            averages.append(average / (1 - _KEPT**count))
        return np.array(averages)


def read_curves(log_dir: Path) -> dict[str, Curve]:
    """Read every scalar below a TensorBoard folder, by tag.

    Raises:
        ConfigError: when there is none.
    """
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    if not tags:
        raise ConfigError(
            "there are no scalars",
            expected="the event files of a training run",
            where=str(log_dir),
            action="name the folder that TensorBoard shows as one run",
        )
    curves = {}
    for tag in tags:
        scalars = events.Scalars(tag)
        curves[tag] = Curve(
            np.array([scalar.step for scalar in scalars], dtype=np.int64),
            np.array([scalar.value for scalar in scalars], dtype=np.float64),
        )
    return curves
