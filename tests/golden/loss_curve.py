"""The loss of twenty CPU steps on one thread, for every loss type and kind of optimizer state.

Other processors sum in another order: the test allows for a part in a thousand, and much less where
the file was made.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parents[1]))

from distill_cache import build_distill_cache

from sdxl_distill.demo.family import build_untrained_family
from sdxl_distill.train.run_folder import RunFolder
from sdxl_distill.train.session import train

RUNS = {
    "float32, mse": [],
    "float32, huber, cosine": [
        "training.loss_type=huber",
        "training.huber_delta=0.1",
        "training.lr_schedule=cosine",
        "training.warmup_steps=3",
    ],
    "bfloat16, 8-bit states": ["student.use_bf16=true", "training.optimizer=adamw_8bit"],
}


def build() -> dict[str, list[float]]:
    """Return the logged loss of every step, per run, as float32 spelled in nine digits."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        cache = build_distill_cache(_made(root / "cache"), build_untrained_family(root / "family"))
        curves: dict[str, list[float]] = {}
        for run, overrides in RUNS.items():
            config = cache.config(
                _made(root / run),
                "training.num_steps=20",
                "training.log_every=1",
                "training.validation.every=20",
                "training.checkpoint_every=20",
                *overrides,
            )
            train(config)
            events = EventAccumulator(str(RunFolder.of(config).tensorboard(config)))
            events.Reload()
            curves[run] = [float(f"{each.value:.9g}") for each in events.Scalars("distill/loss")]
        return curves


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
