"""The configuration files of the demo, written so that a reader can run every command again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sdxl_distill.demo.photos import BUCKETS

NUM_DRAWS: Final = 4
NUM_STEPS: Final = 150
RUN_NAME: Final = "demo"


@dataclass(frozen=True)
class DemoConfigurations:
    """Files relative to the demo's folder, in which all commands run.

    Attributes:
        builders: one file per teacher, by teacher id.
        distill: the student's file.
    """

    builders: dict[str, str]
    distill: str


def write_configurations(folder: Path, teacher_ids: Sequence[str]) -> DemoConfigurations:
    """Write `configs/{teacher_id}.json` and `configs/distill.json`."""
    (folder / "configs").mkdir(exist_ok=True)
    builders = {name: f"configs/{name}.json" for name in teacher_ids}
    for name, path in builders.items():
        _write(folder / path, _builder(name))
    _write(folder / "configs/distill.json", _distill(teacher_ids))
    return DemoConfigurations(builders, "configs/distill.json")


def _builder(teacher_id: str) -> dict[str, Any]:
    return {
        "device": "cpu",
        "teacher": {
            "checkpoint_path": f"family/{teacher_id}",
            "teacher_id": teacher_id,
            "use_bf16": False,
        },
        "data": {
            "image_dir": "photos/train",
            "bucket": {"resolutions": [list(bucket) for bucket in BUCKETS]},
            "records_per_shard": 8,
            "latent_cache": {"cache_dir": "cache/latents"},
        },
        "cache": {
            "output_dir": "cache/teacher_predictions",
            "layout": "compact",
            "draws": NUM_DRAWS,
            "base_seed": 42,
        },
        "model": {"text_encoder_id": "family/base"},
    }


def _distill(teacher_ids: Sequence[str]) -> dict[str, Any]:
    return {
        "device": "cpu",
        "run": {"name": RUN_NAME, "output_root": "runs"},
        "student": {
            "checkpoint_path": "family/base",
            "use_bf16": False,
            "use_gradient_checkpointing": False,
            "ema_decay": 0.95,
        },
        "teachers": [
            {
                "teacher_id": name,
                "cache_dir": "cache/teacher_predictions",
                "weight": 1 / len(teacher_ids),
            }
            for name in teacher_ids
        ],
        # Large steps and a short average, since the run is short.
        "training": {
            "batch_size": 8,
            "num_steps": NUM_STEPS,
            "lr": 5e-4,
            "warmup_steps": 10,
            "lr_schedule": "cosine",
            "log_every": 5,
            "checkpoint_every": 50,
            "validation": {"fraction": 0.1, "every": 25},
            "tensorboard": {"base_dir": "logs"},
        },
        "export": {"dtype": "fp32"},
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
