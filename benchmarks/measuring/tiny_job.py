"""The whole job on the tiny family: checkpoints, photos, latents, teachers, built by the product.

The tiny UNet computes a thousandth of SDXL's, so everything around it weighs a thousand times
more here than on a real card: an overhead that is small here is nothing there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdxl_distill.builder.launch import Launch
from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.demo.family import build_untrained_family
from sdxl_distill.runtime.world import World
from sdxl_distill.sets.latents_set import BuiltLatents, build_latents_set
from sdxl_distill.sets.predictions_set import (
    BuiltPredictions,
    build_predictions_set,
    open_latents,
)
from sdxl_distill.sets.text_set import build_text_set

_WIDTHS = (32, 64, 64)
_TEACHERS = ("teacher_a", "teacher_b", "teacher_c")


@dataclass(frozen=True)
class TinyJob:
    """A folder in which the job is done; all of it in this process and on one compute thread.

    Attributes:
        root: empty at first.
        side_px: of the one bucket.
        records_per_shard: of all sets.
    """

    root: Path
    side_px: int = 256
    records_per_shard: int = 64

    @property
    def family(self) -> Path:
        """Checkpoints `base` and three teachers."""
        return self.root / "family"

    def prepare(self, num_images: int, num_teachers: int = 1) -> None:
        """Write checkpoints and photos of four times the bucket's pixels."""
        with quiet():
            build_untrained_family(self.family, num_teachers=num_teachers, block_widths=_WIDTHS)
        folder = self.root / "images"
        folder.mkdir()
        generator = np.random.default_rng(0)
        size = (2 * self.side_px, 2 * self.side_px)
        for number in range(num_images):
            coarse = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            photo = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
            photo.save(folder / f"{number:06d}.jpg", quality=90)
            (folder / f"{number:06d}.txt").write_text(f"a photo of number {number}")

    def builder(
        self, teacher_id: str = _TEACHERS[0], place: str = "sets", **cache: Any
    ) -> BuilderConfig:
        """Return the configuration of a builder.

        Args:
            teacher_id: teacher_a, teacher_b or teacher_c.
            place: folder of the sets below the root.
            cache: fields of the section `cache`.
        """
        return BuilderConfig.model_validate(
            {
                "device": "cpu",
                "teacher": {
                    "checkpoint_path": str(self.family / teacher_id),
                    "teacher_id": teacher_id,
                    "use_bf16": False,
                },
                "data": {
                    "image_dir": str(self.root / "images"),
                    "bucket": {"resolutions": [[self.side_px, self.side_px]]},
                    "records_per_shard": self.records_per_shard,
                    "latent_cache": {"cache_dir": str(self.root / place / "latents")},
                },
                "cache": {
                    "output_dir": str(self.root / place / "predictions"),
                    "layout": "compact",
                    **cache,
                },
                "model": {"text_encoder_id": str(self.family / "base")},
            }
        )

    def distill(self, num_teachers: int, **training: Any) -> DistillConfig:
        """Return the configuration of a run that trains in float32 as the demo does."""
        return DistillConfig.model_validate(
            {
                "device": "cpu",
                "run": {"name": "run", "output_root": str(self.root / "runs")},
                "student": {
                    "checkpoint_path": str(self.family / "base"),
                    "use_bf16": False,
                    "use_gradient_checkpointing": False,
                },
                "teachers": [
                    {
                        "teacher_id": teacher_id,
                        "cache_dir": str(self.root / "sets/predictions"),
                        "weight": 1 / num_teachers,
                    }
                    for teacher_id in _TEACHERS[:num_teachers]
                ],
                "training": {
                    "lr": 1e-4,
                    "tensorboard": {"base_dir": str(self.root / "logs")},
                    **training,
                },
            }
        )

    def build_latents(self, place: str = "sets") -> BuiltLatents:
        """Build the latents set."""
        with quiet():
            return build_latents_set(self.builder(place=place), Launch(World()))

    def build_text(self) -> None:
        """Build the text set."""
        config = self.builder()
        with quiet(), open_latents(config) as latents:
            build_text_set(config, latents, Launch(World()))

    def build_predictions(self, config: BuilderConfig) -> BuiltPredictions:
        """Build a teacher's predictions set."""
        with quiet():
            return build_predictions_set(config, Launch(World()))


@contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars: a table is printed beside them."""
    with Path(os.devnull).open("w") as nowhere:
        stderr, sys.stderr = sys.stderr, nowhere
        try:
            yield
        finally:
            sys.stderr = stderr
