"""Multi-teacher distillation for SDXL over sharded, streamable caches."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sdxl_distill.shards.shard_set import open_shard_set
    from sdxl_distill.stream.loader import JoinedStream

__all__ = ["JoinedStream", "open_shard_set"]

_HOMES: Final = {
    "JoinedStream": "sdxl_distill.stream.loader",
    "open_shard_set": "sdxl_distill.shards.shard_set",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `--help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
