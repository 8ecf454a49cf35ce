"""What a run logged, read by TensorBoard itself."""

from __future__ import annotations

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.train.run_folder import RunFolder


def logged_losses(config: DistillConfig) -> list[float]:
    """Return `distill/loss` of every step that was logged, in order."""
    folder = RunFolder.of(config).tensorboard(config.training.tensorboard.base_dir)
    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars("distill/loss")]
