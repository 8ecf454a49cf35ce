"""Sets to compare, in folders of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.shard_sets import ShardSets

from sdxl_distill.shards.shard_set import ShardSet


@pytest.fixture
def sets(tmp_path: Path) -> ShardSets:
    """A cache with a latents set, into which a test builds what it compares."""
    cache = ShardSets(tmp_path)
    cache.latents()
    return cache


@pytest.fixture
def teachers(sets: ShardSets) -> Callable[..., list[ShardSet]]:
    """Builds teachers called a, b, …, one for each layout given, and opens them."""
    return sets.opened_teachers
