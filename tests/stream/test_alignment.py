"""Shards that some set lacks, that are stale, or that hold other keys."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.oracles.joined_by_webdataset import read_all
from support.shard_sets import SHARD_SIZES, ShardSets

from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.stream.loader import JoinedStream

LACKING = ((64, 64, 1), (64, 128, 0), (64, 64, 2))


def open_stream(*directories: Path, on_missing: str = "error") -> JoinedStream:
    opened = [open_shard_set(directory) for directory in directories]
    return JoinedStream(opened, global_batch=2, on_missing=on_missing)  # type: ignore[arg-type]


def test_missing_shards_are_counted_by_set_and_bucket(sets: ShardSets) -> None:
    directories = sets.teacher("a"), sets.teacher("b", without=LACKING)
    with pytest.raises(IncompatibleError) as caught:
        open_stream(*directories)
    message = str(caught.value)
    assert "b lacks 2 shards of 64x64, 1 shard of 64x128" in message
    assert "a lacks" not in message
    assert "accelerate launch tools/build_shards.py --config <the configuration of b>" in message
    assert "data.on_missing: intersect" in message


def test_missing_text_names_its_own_command(sets: ShardSets) -> None:
    sets.text(without=[(64, 64, 0)])
    with pytest.raises(
        IncompatibleError, match=r"(?s)text-1+ lacks 1 shard of.*tools/build_text.py"
    ):
        open_stream(sets.teacher("a", "compact"))


def test_intersect_streams_what_all_sets_have(
    sets: ShardSets, caplog: pytest.LogCaptureFixture
) -> None:
    directories = sets.teacher("a"), sets.teacher("b", without=LACKING)
    with open_stream(*directories, on_missing="intersect") as stream:
        keys = {key for epoch in range(3) for batch in stream.epoch(epoch) for key in batch.keys}
    assert keys == set(read_all(directories[1]))
    assert "left out: b lacks 2 shards of 64x64" in caplog.text


def test_sets_without_a_common_shard_are_refused(sets: ShardSets) -> None:
    half = list(SHARD_SIZES)[:2]
    rest = list(SHARD_SIZES)[2:]
    directories = sets.teacher("a", without=half), sets.teacher("b", without=rest)
    with pytest.raises(ConfigError, match="no shard that all sets have"):
        open_stream(*directories, on_missing="intersect")


@pytest.mark.parametrize("on_missing", ["error", "intersect"])
def test_shards_made_from_other_latents_shards_are_stale(sets: ShardSets, on_missing: str) -> None:
    directories = sets.teacher("a", draws=2), sets.teacher("b", draws=2)
    shutil.rmtree(sets.root / "latents")
    sets.latents(salt="on another device")
    with pytest.raises(IncompatibleError) as caught:
        open_stream(*directories, on_missing=on_missing)
    message = str(caught.value)
    assert "stale" in message
    assert "a has 6 shards of 64x64, 4 shards of 64x128; b has 6 shards of 64x64" in message
    assert "--repair" in message


def test_the_first_key_that_differs_is_named(sets: ShardSets) -> None:
    directory = sets.teacher("a")
    other = replace(sets, shard_sizes={**SHARD_SIZES, (64, 64, 1): 3})
    expected = sorted(sets.ids((64, 64, 1)))
    missing = next(
        record
        for record, pair in enumerate(zip(expected, [*other.ids((64, 64, 1)), "", ""], strict=True))
        if pair[0] != pair[1]
    )
    wrong = other.teacher("b")
    with pytest.raises(CorruptError) as caught:
        open_stream(directory, wrong)
    assert f"set b, shard b-64x64-000001.tar: record {missing} is " in str(caught.value)
    assert f"expected {expected[missing]}_64x64, as in set latents" in str(caught.value)


def test_empty_shards_are_no_obstacle(tmp_path: Path) -> None:
    sets = ShardSets(tmp_path, {(64, 64, 0): 0, (64, 64, 1): 3, (64, 128, 0): 0})
    sets.latents()
    with open_stream(sets.teacher("a")) as stream:
        assert {key for batch in stream.epoch(0) for key in batch.keys} <= {
            f"{identity}_64x64" for identity in sets.ids((64, 64, 1))
        }
