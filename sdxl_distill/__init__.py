"""Multi-teacher distillation for SDXL over sharded, streamable caches.

The names in `__all__` are the public ones; docs/api.md shows each in use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sdxl_distill.builder.launch import Launch
    from sdxl_distill.config.builder import BuilderConfig
    from sdxl_distill.config.distill import DistillConfig
    from sdxl_distill.config.loader import load_config
    from sdxl_distill.errors import (
        ConfigError,
        CorruptError,
        DistillError,
        IncompatibleError,
        NumericalError,
        Preempted,
        StorageError,
    )
    from sdxl_distill.export.student import export_student
    from sdxl_distill.runtime.world import World
    from sdxl_distill.sets.latents_set import build_latents_set
    from sdxl_distill.sets.predictions_set import build_predictions_set
    from sdxl_distill.shards.shard_set import ShardSet, open_shard_set
    from sdxl_distill.stream.batch import JoinedBatch
    from sdxl_distill.stream.loader import JoinedStream
    from sdxl_distill.train.session import train_student
    from sdxl_distill.verify.whole_set import verify_set

__all__ = [
    "BuilderConfig",
    "ConfigError",
    "CorruptError",
    "DistillConfig",
    "DistillError",
    "IncompatibleError",
    "JoinedBatch",
    "JoinedStream",
    "Launch",
    "NumericalError",
    "Preempted",
    "ShardSet",
    "StorageError",
    "World",
    "build_latents_set",
    "build_predictions_set",
    "export_student",
    "load_config",
    "open_shard_set",
    "train_student",
    "verify_set",
]

_MODULES: Final = {
    "builder.launch": ["Launch"],
    "config.builder": ["BuilderConfig"],
    "config.distill": ["DistillConfig"],
    "config.loader": ["load_config"],
    "errors": [
        *("ConfigError", "CorruptError", "DistillError", "IncompatibleError"),
        *("NumericalError", "Preempted", "StorageError"),
    ],
    "export.student": ["export_student"],
    "runtime.world": ["World"],
    "sets.latents_set": ["build_latents_set"],
    "sets.predictions_set": ["build_predictions_set"],
    "shards.shard_set": ["ShardSet", "open_shard_set"],
    "stream.batch": ["JoinedBatch"],
    "stream.loader": ["JoinedStream"],
    "train.session": ["train_student"],
    "verify.whole_set": ["verify_set"],
}
_MODULE_OF: Final = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `--help` must not wait for torch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
