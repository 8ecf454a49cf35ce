"""The loss of twenty float32 steps on a CPU, for two loss types and two learning rate schedules.

In bfloat16 each instruction set has a curve of its own, up to 1 % away: those steps are compared
bit for bit with a plain loop in the same process (tests/train/test_exact_steps.py).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.distill_cache import build_distill_cache
from support.oracles.loss_curve import logged_losses

from sdxl_distill.demo.family import build_untrained_family
from sdxl_distill.train.session import train_student

RUNS = {
    "float32, mse": [],
    "float32, huber, cosine": [
        "training.loss_type=huber",
        "training.huber_delta=0.1",
        "training.lr_schedule=cosine",
        "training.warmup_steps=3",
    ],
}


def build() -> dict[str, list[float]]:
    """Return the logged loss of every step, per run, as float32 spelled in nine digits."""
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
            train_student(config)
            curves[run] = [float(f"{loss:.9g}") for loss in logged_losses(config)]
        return curves


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
