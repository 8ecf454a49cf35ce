"""The stream: one order whatever the world and the threads, resumed anywhere, shut down cleanly."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from support.oracles.joined_by_webdataset import read_all
from support.patience import PATIENCE_SECONDS
from support.shard_sets import SHARD_SIZES, ShardSets, path_of

from sdxl_distill.core.bucket import Bucket
from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.runtime.world import World
from sdxl_distill.shards.shard_set import ShardSet, open_shard_set
from sdxl_distill.stream.batch import JoinedBatch
from sdxl_distill.stream.loader import JoinedStream

Teachers = Callable[..., list[ShardSet]]
GLOBAL_BATCH = 8


@pytest.fixture
def pair(teachers: Teachers) -> list[ShardSet]:
    return teachers("full", "compact", draws=2)


def reads(batch: JoinedBatch) -> tuple[int, int, tuple[str, ...], tuple[int, ...], list[float]]:
    sums = [float(each.double().sum()) for each in (batch.latents, *batch.predictions)]
    return batch.epoch, batch.step, batch.keys, batch.draws, sums


def epochs(stream: JoinedStream, num_epochs: int = 4) -> Iterator[JoinedBatch]:
    return (batch for epoch in range(num_epochs) for batch in stream.epoch(epoch))


def test_the_order_is_the_same_for_every_world_and_thread_count(pair: list[ShardSet]) -> None:
    def global_keys(world: int, num_threads: int) -> list[list[tuple[str, int]]]:
        steps: dict[tuple[int, int], list[tuple[str, int]]] = {}
        for rank in range(world):
            stream = JoinedStream(
                pair, global_batch=GLOBAL_BATCH, world=World(rank, world), num_threads=num_threads
            )
            with stream:
                for batch in epochs(stream):
                    at = batch.epoch, batch.step
                    row = steps.setdefault(at, [("", 0)] * GLOBAL_BATCH)
                    (read,) = stream.order.batches(*at, at[1] + 1, rank=rank, world=world)
                    places = read.positions.tolist()
                    for place, key, draw in zip(places, batch.keys, batch.draws, strict=True):
                        row[place] = key, draw
        return [steps[at] for at in sorted(steps)]

    orders = [global_keys(world, threads) for world in (1, 2, 4, 8) for threads in (0, 1, 3)]
    assert len(orders[0]) > 4
    assert all(order == orders[0] for order in orders[1:])


def test_each_epoch_is_close_to_one_pass_over_the_images(pair: list[ShardSet]) -> None:
    num_epochs = 8
    with JoinedStream(pair, global_batch=GLOBAL_BATCH) as stream:
        keys = [key for batch in epochs(stream, num_epochs) for key in batch.keys]
    expected = set(read_all(path_of(pair[0]).parents[1] / "latents"))
    assert set(keys) == expected
    views = np.unique(keys, return_counts=True)[1]
    assert views.max() <= num_epochs
    assert views.min() >= num_epochs - 3


def test_a_stream_resumes_at_any_step(pair: list[ShardSet]) -> None:
    with JoinedStream(pair, global_batch=GLOBAL_BATCH) as stream:
        whole = list(map(reads, epochs(stream)))
    for position, (epoch, step, *_) in enumerate(whole):
        with JoinedStream(pair, global_batch=GLOBAL_BATCH) as stream:
            rest = list(map(reads, islice(stream.forever(epoch, step), len(whole) - position)))
        assert rest == whole[position:]


def test_forever_skips_empty_epochs(sets: ShardSets) -> None:
    with (
        open_shard_set(sets.teacher("a")) as teacher,
        JoinedStream([teacher], global_batch=32) as stream,
    ):
        numbers = [batch.epoch for batch in islice(stream.forever(), 4)]
        assert stream.order.steps(0) == 0
    assert numbers == sorted(numbers)
    assert numbers[0] > 0


def test_an_epoch_that_ends_before_the_step_is_refused_at_the_call(pair: list[ShardSet]) -> None:
    with (
        JoinedStream(pair, global_batch=GLOBAL_BATCH) as stream,
        pytest.raises(IncompatibleError, match="step 99 of epoch 0"),
    ):
        stream.epoch(0, 99)


def test_a_world_that_does_not_divide_the_lanes_is_refused_when_opened(
    pair: list[ShardSet],
) -> None:
    with pytest.raises(ConfigError, match="3 processes for 8 lanes"):
        JoinedStream(pair, global_batch=GLOBAL_BATCH, world=World(0, 3))


def test_each_batch_has_tensors_of_its_own(pair: list[ShardSet]) -> None:
    with JoinedStream(pair, global_batch=GLOBAL_BATCH, prefetch=1) as stream:
        batches = list(epochs(stream))
        sums = [reads(batch) for batch in batches]
        for batch in batches:
            batch.latents.zero_()
        assert [reads(batch)[4][1:] for batch in batches] == [each[4][1:] for each in sums]
    pointers = {batch.latents.data_ptr() for batch in batches}
    assert len(pointers) == len(batches)


def test_a_stream_describes_what_it_joins(pair: list[ShardSet]) -> None:
    with JoinedStream(pair, global_batch=GLOBAL_BATCH) as stream:
        assert stream.teacher_ids == ("a", "b")
        assert stream.prediction_types == ("epsilon", "epsilon")
        assert stream.table_fingerprint == stream.noise_schedules[1].table_fingerprint()
        assert stream.fingerprints().keys() == {"a", "b", "latents"}


def stream_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("stream")]


def test_closing_ends_the_threads_of_a_half_read_epoch(pair: list[ShardSet]) -> None:
    with JoinedStream(pair, global_batch=GLOBAL_BATCH) as stream:
        batches = stream.forever()
        next(batches)
        assert stream_threads()
    assert not stream_threads()


def test_a_forgotten_stream_leaves_no_thread_behind(pair: list[ShardSet]) -> None:
    stream = JoinedStream(pair, global_batch=GLOBAL_BATCH)
    batches = stream.forever()
    next(batches)
    threads = stream_threads()
    assert threads
    del stream, batches
    gc.collect()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert not any(thread.is_alive() for thread in threads)


def test_closing_lets_go_of_the_sets_that_the_stream_opened_and_of_no_other(
    teachers: Teachers,
) -> None:
    def num_open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    pair = teachers("compact", "compact")
    before = num_open_files()
    stream = JoinedStream(pair, global_batch=GLOBAL_BATCH)
    opened = [each for each in stream._sets.all if each not in pair]
    assert [each.manifest.identity.kind for each in opened] == ["latents", "text"]
    for shard_set in (*opened, *pair):
        shard_set.reader(shard_set.manifest.names()[0]).read_record(0)
    assert num_open_files() == before + len(opened) + len(pair)
    stream.close()
    assert num_open_files() == before + len(pair)
    for shard_set in pair:
        shard_set.close()
    assert num_open_files() == before


def test_two_epochs_may_be_read_at_once(pair: list[ShardSet]) -> None:
    with JoinedStream(pair, global_batch=GLOBAL_BATCH, num_threads=2) as stream:
        alone = list(map(reads, epochs(stream)))
        first, second = epochs(stream), epochs(stream)
        in_turn = [reads(next(each)) for _ in alone for each in (first, second)]
    assert in_turn[::2] == in_turn[1::2] == alone


def test_a_fault_surfaces_at_its_batch_after_the_good_ones(pair: list[ShardSet]) -> None:
    with JoinedStream(pair, global_batch=GLOBAL_BATCH) as stream:
        good = list(epochs(stream))
    damaged = max(path_of(pair[1]).glob("*.tar"))
    damaged.chmod(0o644)
    damaged.write_bytes(bytes(damaged.stat().st_size))
    image_ids = {each.hex() for each in _ids_of(pair[1], damaged.name)}
    num_good = next(
        position
        for position, batch in enumerate(good)
        if any(
            key[:32] in image_ids and draw == 1
            for key, draw in zip(batch.keys, batch.draws, strict=True)
        )
    )
    with JoinedStream(pair, global_batch=GLOBAL_BATCH, num_threads=3) as stream:
        batches = stream.forever()
        read = [next(batches) for _ in range(num_good)]
        assert list(map(reads, read)) == list(map(reads, good[:num_good]))
        with pytest.raises(CorruptError, match=damaged.name):
            next(batches)
        assert list(batches) == []


def _ids_of(shard_set: ShardSet, tar_name: str) -> list[bytes]:
    (name,) = (name for name in shard_set.manifest.names() if name.tar == tar_name)
    return [row.tobytes() for row in shard_set.index(name).ids]


def test_validation_takes_the_images_whose_ids_are_below_the_fraction(
    pair: list[ShardSet], sets: ShardSets
) -> None:
    fraction = 0.5
    ids = {identity for place in SHARD_SIZES for identity in sets.ids(place)}
    expected = {each for each in ids if int(each[:8], 16) < fraction * 2**32}
    assert 0 < len(expected) < len(ids)
    with JoinedStream(pair, global_batch=2, validation_fraction=fraction) as stream:
        batches = list(stream.validation_batches(3))
        trained = {key[:32] for batch in epochs(stream) for key in batch.keys}
    held_out = [key[:32] for batch in batches for key in batch.keys]
    assert sorted(held_out) == sorted(expected)
    assert stream.num_validation_records == len(expected)
    assert trained == ids - expected
    assert {draw for batch in batches for draw in batch.draws} == {0}
    assert max(map(len, batches)) <= 3


@pytest.mark.parametrize("world", [2, 8])
def test_the_shares_of_all_ranks_are_every_validation_record_once(
    pair: list[ShardSet], world: int
) -> None:
    def held_out(rank: int, world: int) -> list[str]:
        stream = JoinedStream(
            pair, global_batch=8, validation_fraction=0.5, world=World(rank, world)
        )
        with stream:
            return [key for batch in stream.validation_batches(2) for key in batch.keys]

    shares = [key for rank in range(world) for key in held_out(rank, world)]
    assert sorted(shares) == sorted(held_out(0, 1))


def test_a_bounded_validation_is_the_first_records_of_every_bucket_in_proportion(
    pair: list[ShardSet],
) -> None:
    def held_out(max_records: int | None, world: World) -> dict[Bucket, list[str]]:
        keys: dict[Bucket, list[str]] = {}
        with JoinedStream(pair, global_batch=8, validation_fraction=0.5, world=world) as stream:
            for batch in stream.validation_batches(2, max_records):
                keys.setdefault(batch.bucket, []).extend(batch.keys)
        return keys

    whole = held_out(None, World())
    num_records = {bucket: len(keys) for bucket, keys in whole.items()}
    total = sum(num_records.values())
    assert len(whole) > 1
    for limit in range(1, total + 2):
        bounded = held_out(limit, World())
        assert sum(map(len, bounded.values())) == min(limit, total)
        for bucket, keys in whole.items():
            mine = bounded.get(bucket, [])
            assert mine == keys[: len(mine)]
            assert abs(len(mine) - num_records[bucket] * min(limit, total) / total) < 1
        shares = [held_out(limit, World(rank, 2)) for rank in range(2)]
        for bucket, keys in bounded.items():
            assert sorted(keys) == sorted(k for share in shares for k in share.get(bucket, []))


def test_validation_holds_what_webdataset_reads(pair: list[ShardSet]) -> None:
    records = read_all(path_of(pair[0]))
    with JoinedStream(pair, global_batch=2, validation_fraction=0.5) as stream:
        for batch in stream.validation_batches(2):
            expected = torch.stack([records[key]["teacher_pred"] for key in batch.keys])
            assert torch.equal(batch.predictions[0], expected)


def test_without_a_validation_split_no_index_is_read_when_opened(
    pair: list[ShardSet],
) -> None:
    for path in path_of(pair[0]).parents[1].rglob("*.idx"):
        path.unlink()
    JoinedStream(pair, global_batch=GLOBAL_BATCH).close()


def test_a_split_that_leaves_nothing_to_train_on_is_refused(pair: list[ShardSet]) -> None:
    with pytest.raises(ConfigError, match="has a record to stream"):
        JoinedStream(pair, global_batch=GLOBAL_BATCH, validation_fraction=1.0)


def test_a_bucket_smaller_than_the_batch_is_reported(
    pair: list[ShardSet], caplog: pytest.LogCaptureFixture
) -> None:
    JoinedStream(pair, global_batch=GLOBAL_BATCH).close()
    assert "bucket 64x128 has 7 records, fewer than the global batch of 8" in caplog.text
    assert "64x64 " not in caplog.text


def test_without_threads_the_caller_reads_all(pair: list[ShardSet]) -> None:
    known = set(threading.enumerate())
    with JoinedStream(pair, global_batch=GLOBAL_BATCH, num_threads=0) as stream:
        batches = list(stream.epoch(0))
        assert set(threading.enumerate()) == known
    assert len(batches) == stream.order.steps(0)


def test_a_batch_that_was_dropped_gives_its_memory_to_the_next(pair: list[ShardSet]) -> None:
    with JoinedStream(pair, global_batch=GLOBAL_BATCH, num_threads=0) as stream:
        batches = stream.forever()
        pages = {next(batches).latents.data_ptr() // 4096 for _ in range(3)}
    assert len(pages) == 1  # a block begins at a page, the latents with it


def test_a_batch_that_is_kept_keeps_its_content(pair: list[ShardSet]) -> None:
    with JoinedStream(pair, global_batch=GLOBAL_BATCH, num_threads=2) as stream:
        kept = list(stream.epoch(0))
        again = [batch.latents.clone() for batch in stream.epoch(0)]
    assert all(torch.equal(old.latents, new) for old, new in zip(kept, again, strict=True))
