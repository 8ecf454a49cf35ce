"""A place where sets are built from start to end: images, checkpoints, caches, a configuration."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_distill.builder.launch import Launch
from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.config.loader import load_config
from sdxl_distill.demo.family import Family
from sdxl_distill.runtime.world import World
from sdxl_distill.sets.latents_set import BuiltLatents, build_latents_set
from sdxl_distill.sets.predictions_set import BuiltPredictions, build_predictions_set

BUCKETS = ((128, 128), (160, 96), (96, 160), (128, 96))
TEACHER_ID = "teacher_a"


@dataclass(frozen=True)
class Workshop:
    """One folder with everything; all builds run in this process.

    Attributes:
        root: `root/images`, `root/latents`, `root/predictions/{set id}`, `root/builder.json`.
        family: the checkpoints; `teacher_a` is the configured teacher.
    """

    root: Path
    family: Family

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def latents(self) -> Path:
        return self.root / "latents"

    @property
    def predictions(self) -> Path:
        return self.root / "predictions"

    @property
    def teacher(self) -> Path:
        return self.predictions / TEACHER_ID

    @property
    def text(self) -> Path:
        (path,) = self.predictions.glob("text-*")
        return path

    @property
    def config_file(self) -> Path:
        """The configuration; written at the first use."""
        path = self.root / "builder.json"
        if not path.exists():
            path.write_text(json.dumps(self._settings(), indent=1))
        return path

    def config(self, *overrides: str) -> BuilderConfig:
        """Load the configuration as a user does, with `a.b.c=value` overrides."""
        return load_config(self.config_file, BuilderConfig, overrides)

    def build_latents(self, *overrides: str, **options: Any) -> BuiltLatents:
        return build_latents_set(self.config(*overrides), Launch(World()), **options)

    def build_shards(self, *overrides: str, **options: Any) -> BuiltPredictions:
        return build_predictions_set(self.config(*overrides), Launch(World()), **options)

    def _settings(self) -> dict[str, Any]:
        return {
            "device": "cpu",
            "teacher": {
                "checkpoint_path": str(self.family.teachers[0]),
                "teacher_id": TEACHER_ID,
                "use_bf16": False,
            },
            "data": {
                "image_dir": str(self.images),
                "bucket": {"resolutions": BUCKETS},
                "latent_cache": {"cache_dir": str(self.latents), "batch_size": 2},
                "records_per_shard": 3,
            },
            "cache": {
                "output_dir": str(self.predictions),
                "layout": "compact",
                "batch_size": 2,
            },
            "model": {"text_encoder_id": str(self.family.base)},
        }


def published_files(directory: Path) -> dict[str, bytes]:
    """Return all that a set says: tars, indices, set record, manifest and what else is there."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.parent.name != "catalog"
    }


def traces(root: Path) -> list[str]:
    """Return temporary files, claims, heartbeats and withdrawn folders: none outlive a build."""
    marks = (".tmp-", ".withdrawn-")
    left = [
        path
        for path in root.rglob("*")
        if any(mark in path.name for mark in marks)
        or (path.is_file() and ".build" in path.relative_to(root).parts)
    ]
    return sorted(path.relative_to(root).as_posix() for path in left)


def identities(paths: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Return inode and time of change of each file: a file built again has others."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}
