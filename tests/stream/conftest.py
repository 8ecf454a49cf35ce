"""Sets to join, in folders of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from shard_sets import ShardSets

from sdxl_distill.shards.shard_set import ShardSet, open_shard_set


@pytest.fixture
def sets(tmp_path: Path) -> ShardSets:
    """A cache with a latents set, into which a test builds what it joins."""
    cache = ShardSets(tmp_path)
    cache.latents()
    return cache


@pytest.fixture
def teachers(sets: ShardSets) -> Callable[..., list[ShardSet]]:
    """Builds teachers called a, b, …, one for each layout given, and opens them."""

    def build(*layouts: str, draws: int = 1) -> list[ShardSet]:
        if "compact" in layouts:
            sets.text()
        return [
            open_shard_set(sets.teacher(chr(ord("a") + row), layout, draws=draws))  # type: ignore[arg-type]
            for row, layout in enumerate(layouts)
        ]

    return build
