"""Sizes of sets, computed before they exist and summed over their files."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.shard_sets import (
    HIDDEN_SIZE,
    NUM_CHANNELS,
    NUM_TOKENS,
    POOLED_SIZE,
    SHARD_SIZES,
    ShardSets,
)

from sdxl_distill.estimate.set_size import planned_size, present_size
from sdxl_distill.shards.record import predictions_schema, text_schema
from sdxl_distill.shards.shard_set import open_shard_set

SIZES = (NUM_CHANNELS, NUM_TOKENS, HIDDEN_SIZE, POOLED_SIZE)
PLANNED = [(width, height, count) for (width, height, _), count in SHARD_SIZES.items()]


def bytes_of_files(directory: Path) -> int:
    shards = [path for path in directory.iterdir() if path.suffix in {".tar", ".idx"}]
    return sum(path.stat().st_size for path in shards)


@pytest.fixture
def sets(tmp_path) -> ShardSets:
    sets = ShardSets(tmp_path)
    sets.latents()
    sets.text()
    return sets


@pytest.mark.parametrize("layout", ["full", "compact"])
@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_predictions_are_as_large_as_planned(sets, layout, dtype):
    directory = sets.teacher("a", layout, dtype=dtype)
    planned = planned_size(predictions_schema(layout, dtype, *SIZES), PLANNED)
    assert planned.num_bytes == bytes_of_files(directory)
    assert (planned.num_shards, planned.num_records) == (5, 18)


def test_text_is_as_large_as_planned(sets):
    (directory,) = (sets.root / "teachers").glob("text-*")
    planned = planned_size(text_schema(*SIZES[1:]), PLANNED)
    assert planned.num_bytes == bytes_of_files(directory)


@pytest.mark.parametrize("place", ["latents", "teachers/a"])
def test_a_set_that_is_there_is_as_large_as_its_files(sets, place):
    sets.teacher("a", "compact", draws=2)
    directory = sets.root / place
    with open_shard_set(directory) as shard_set:
        size = present_size(shard_set.manifest)
    assert size.num_bytes == bytes_of_files(directory)
    assert size.num_shards == len(list(directory.glob("*.tar")))


def test_equal_shards_are_counted_each():
    schema = text_schema(*SIZES[1:])
    one, three = (planned_size(schema, [(64, 64, 5)] * count) for count in (1, 3))
    assert three.num_bytes == 3 * one.num_bytes
