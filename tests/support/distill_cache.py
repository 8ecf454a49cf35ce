"""A small complete cache made by the real builders, and the configurations that train from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sdxl_distill.builder.launch import Launch
from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.config.loader import load_config
from sdxl_distill.runtime.world import World
from sdxl_distill.sets.latents_set import build_latents_set
from sdxl_distill.sets.predictions_set import build_predictions_set
from sdxl_distill.shards.shard_set import ShardSet, open_shard_set

if TYPE_CHECKING:
    from sdxl_distill.demo.family import Family

BUCKETS = [(64, 64), (96, 64), (64, 96)]
NUM_IMAGES = 24
WEIGHTS = {"ann": 0.75, "bob": 0.25}
LAYOUTS = {"ann": "full", "bob": "compact"}


@dataclass(frozen=True)
class DistillCache:
    """Images, latents, text and the predictions of teachers `ann` and `bob` in two draws.

    Attributes:
        root: `images`, `latents` and `predictions/{teacher}` lie here.
        family: whose base is the student and whose first two teachers were cached.
    """

    root: Path
    family: Family

    def builder_config(self, teacher_id: str, *overrides: str) -> BuilderConfig:
        """Return the configuration that builds a teacher's set, and all before it."""
        teacher = self.family.teachers[list(WEIGHTS).index(teacher_id)]
        return _load(
            self.root / f"{teacher_id}.json",
            {
                "teacher": {
                    "checkpoint_path": str(teacher),
                    "teacher_id": teacher_id,
                    "use_bf16": False,
                },
                "data": {
                    "image_dir": str(self.root / "images"),
                    "records_per_shard": 3,
                    "bucket": {"resolutions": BUCKETS},
                    "latent_cache": {"cache_dir": str(self.root / "latents")},
                },
                "cache": {
                    "output_dir": str(self.root / "predictions"),
                    "draws": 2,
                    "layout": LAYOUTS[teacher_id],
                },
                "model": {"text_encoder_id": str(self.family.base)},
            },
            BuilderConfig,
            overrides,
        )

    def config(self, folder: Path, *overrides: str) -> DistillConfig:
        """Return a short run of six steps without noise from the optimizer, in `folder`."""
        return load_config(self.config_file(folder), DistillConfig, overrides)

    def config_file(self, folder: Path) -> Path:
        """Write the run's configuration as a file in `folder`."""
        teachers = [
            {
                "teacher_id": teacher_id,
                "cache_dir": str(self.root / "predictions"),
                "weight": weight,
            }
            for teacher_id, weight in WEIGHTS.items()
        ]
        return _write(
            folder / "distill.json",
            {
                "run": {"name": "run", "output_root": str(folder / "runs")},
                "student": {
                    "checkpoint_path": str(self.family.base),
                    "use_bf16": False,
                    "use_gradient_checkpointing": False,
                },
                "teachers": teachers,
                "training": {
                    "batch_size": 4,
                    "num_steps": 6,
                    "lr": 5e-4,
                    "exact_masters": False,
                    "warmup_steps": 0,
                    "lr_schedule": "constant",
                    "checkpoint_every": 2,
                    "log_every": 2,
                    "validation": {"fraction": 0.2, "every": 3},
                    "tensorboard": {"base_dir": str(folder / "logs")},
                },
            },
        )

    @contextmanager
    def teachers(self) -> Iterator[list[ShardSet]]:
        """Open both predictions sets within the block."""
        first, second = (open_shard_set(self.root / "predictions" / name) for name in WEIGHTS)
        with first, second:
            yield [first, second]


def write_images(folder: Path, numbers: range) -> None:
    """Write images of noise in turn over the buckets; four captions are shared by all."""
    folder.mkdir(exist_ok=True)
    for number in numbers:
        width, height = BUCKETS[number % len(BUCKETS)]
        pixels = np.random.default_rng(number).integers(
            0, 255, (height + 9, width + 3, 3), np.uint8
        )
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"a photo of a cat, {number % 4}")


def build_distill_cache(root: Path, family: Family) -> DistillCache:
    """Build everything: about five seconds."""
    cache = DistillCache(root, family)
    write_images(root / "images", range(NUM_IMAGES))
    build_all(cache)
    return cache


def build_all(cache: DistillCache, *overrides: str) -> None:
    """Build what is missing of the latents and of both teachers' sets."""
    build_latents_set(cache.builder_config("ann", *overrides), Launch(World()))
    for teacher_id in WEIGHTS:
        build_predictions_set(cache.builder_config(teacher_id, *overrides), Launch(World()))


def _write(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


def _load(
    path: Path, content: Mapping[str, Any], schema: type[BuilderConfig], overrides: tuple[str, ...]
) -> BuilderConfig:
    return load_config(_write(path, content), schema, overrides)
