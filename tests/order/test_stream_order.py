"""Invariants of the stream order: numbers as in docs/determinism.md, "Invariants"."""

from __future__ import annotations

import json
import runpy
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from sdxl_distill.order.stream_order import PlannedBatch, ShardTable, StreamOrder

GOLDEN = Path(__file__).parents[1] / "golden"
SIDES = (512, 640, 768)
Row = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Case:
    """Arguments of a order."""

    rows: tuple[Row, ...]
    global_batch: int
    lanes: int
    window: int
    seed: int = 1
    num_draws: int = 1

    def order(self) -> StreamOrder:
        return StreamOrder(
            ShardTable.from_rows(self.rows),
            seed=self.seed,
            global_batch=self.global_batch,
            lanes=self.lanes,
            window=self.window,
            num_draws=self.num_draws,
        )

    def num_records(self) -> Counter[tuple[int, int]]:
        totals: Counter[tuple[int, int]] = Counter()
        for width, height, _, _, count in self.rows:
            totals[width, height] += count
        return totals


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small tables: empty shards, single records, n < C, n < G, laps larger than the window."""
    sizes = st.lists(st.sampled_from([0, 1, 2, 5, 17, 40]), min_size=1, max_size=6)
    rows: list[Row] = []
    for side in SIDES[: draw(st.integers(1, 3))]:
        counts = draw(sizes)
        numbers = draw(
            st.lists(st.integers(0, 99), min_size=len(counts), max_size=len(counts), unique=True)
        )
        firsts = draw(st.lists(st.integers(0, 3), min_size=len(counts), max_size=len(counts)))
        rows += [
            (side, 512, number, first, count)
            for number, first, count in zip(numbers, firsts, counts, strict=True)
        ]
    if not any(row[4] for row in rows):
        rows.append((512, 512, 100, 0, draw(st.integers(1, 9))))
    global_batch = draw(st.integers(1, 24))
    return Case(
        rows=tuple(draw(st.permutations(rows))),
        global_batch=global_batch,
        lanes=draw(st.sampled_from(divisors(global_batch))),
        window=draw(st.sampled_from([1, 3, 8, 64])),
        seed=draw(st.integers(0, 2**64 - 1)),
        num_draws=draw(st.integers(1, 3)),
    )


def one_bucket(num_shards: int, records: int, **arguments: int) -> Case:
    rows = tuple((1024, 1024, number, 0, records) for number in range(num_shards))
    defaults = {"global_batch": 64, "lanes": 64, "window": 16384}
    return Case(rows, **(defaults | arguments))


def epochs(order: StreamOrder, num_epochs: int, **rank: int) -> Iterator[PlannedBatch]:
    for epoch in range(num_epochs):
        yield from order.batches(epoch, 0, order.steps(epoch), **rank)


def plain(batches: Iterator[PlannedBatch]) -> list[list[Any]]:
    return [[*batch[:3], *(column.tolist() for column in batch[3:])] for batch in batches]


def reads_by_lap(case: Case, num_laps: int) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
    """Return (row, record, draw) in the order of places, by (bucket index, lap)."""
    order = case.order()
    reads: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    turns: Counter[int] = Counter()
    num_records = [case.num_records()[bucket] for bucket in order.table.buckets]
    # One epoch more: the last batch of a lap may lie in the next one.
    for batch in epochs(order, num_laps + case.global_batch):
        first = turns[batch.bucket] * case.global_batch
        turns[batch.bucket] += 1
        columns = (first + batch.positions, batch.shards, batch.records, batch.draws)
        for place, *read in np.stack(columns, axis=1).tolist():
            lap = place // num_records[batch.bucket]
            reads.setdefault((batch.bucket, lap), []).append((read[0], read[1], read[2]))
    return {key: value for key, value in reads.items() if key[1] < num_laps}


# I1


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_ranks_together_read_what_one_rank_reads(case: Case) -> None:
    alone = plain(epochs(case.order(), 3))
    for world in divisors(case.lanes):
        ranks = [epochs(case.order(), 3, rank=r, world=world) for r in range(world)]
        for expected, *parts in zip(alone, *ranks, strict=True):
            assert all(part[:3] == tuple(expected[:3]) for part in parts)
            order = np.argsort(np.concatenate([part.positions for part in parts]))
            merged = [
                np.concatenate(columns)[order]
                for columns in zip(*(p[3:] for p in parts), strict=True)
            ]
            assert [column.tolist() for column in merged] == expected[3:]


@settings(max_examples=30, deadline=None)
@given(case=cases(), size=st.integers(1, 70))
def test_the_size_of_chunks_changes_nothing(case: Case, size: int) -> None:
    order = case.order()
    steps = order.steps(0)
    chunks = [
        batch
        for start in range(0, steps, size)
        for batch in order.batches(0, start, min(start + size, steps))
    ]
    assert plain(iter(chunks)) == plain(order.batches(0, 0, steps))


def test_threads_on_one_schedule_read_what_one_thread_reads() -> None:
    case = one_bucket(40, 100, global_batch=8, lanes=8, window=64)
    expected = [plain(case.order().batches(e, 0, case.order().steps(e))) for e in range(8)]
    shared = case.order()
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda e: plain(shared.batches(e, 0, shared.steps(e))), range(8))
        assert list(found) == expected


# I2


@settings(max_examples=50, deadline=None)
@given(case=cases(), position=st.data())
def test_a_fresh_schedule_knows_any_step_without_walking_there(
    case: Case, position: st.DataObject
) -> None:
    walked = plain(epochs(case.order(), 4))
    if walked:
        expected = walked[position.draw(st.integers(0, len(walked) - 1))]
        epoch, step = expected[:2]
        assert plain(case.order().batches(epoch, step, step + 1)) == [expected]


# I3


@settings(max_examples=50, deadline=None)
@given(case=cases(), epoch=st.integers(0, 50))
def test_an_epoch_is_one_pass_over_each_bucket_in_whole_batches(case: Case, epoch: int) -> None:
    order = case.order()
    found = Counter(b.bucket for b in order.batches(epoch, 0, order.steps(epoch)))
    for index, bucket in enumerate(order.table.buckets):
        records = case.num_records()[bucket]
        turns = [(epoch + i) * records // case.global_batch for i in (0, 1)]
        assert found[index] == turns[1] - turns[0]
        assert order.describe(epoch)[index].num_steps == found[index]


@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_global_steps_count_the_steps_of_all_epochs(case: Case) -> None:
    order = case.order()
    positions = [(e, s) for e in range(30) for s in range(order.steps(e))]
    assert [order.global_step(*position) for position in positions] == list(range(len(positions)))
    assert [order.position_of(step) for step in range(len(positions))] == positions


def test_an_epoch_may_be_empty() -> None:
    order = one_bucket(1, 3, global_batch=8, lanes=8).order()
    assert [order.steps(epoch) for epoch in range(6)] == [0, 0, 1, 0, 0, 1]
    assert list(order.batches(0, 0, 0)) == []
    assert order.position_of(0) == (2, 0)


def test_positions_are_found_far_from_the_start() -> None:
    order = one_bucket(1000, 10**6).order()
    position = order.position_of(10**15 + 7)
    assert order.global_step(*position) == 10**15 + 7


# I4, I6


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_a_lap_holds_every_record_once(case: Case) -> None:
    laps = reads_by_lap(case, 3)
    assert len(laps) == 3 * sum(records > 0 for records in case.num_records().values())
    for (bucket, lap), reads in laps.items():
        label = sorted({row[:2] for row in case.rows})[bucket]
        every_record = [
            (index, first + record, lap % case.num_draws)
            for index, (width, height, _, first, count) in enumerate(case.rows)
            for record in range(count)
            if (width, height) == label
        ]
        assert sorted(reads) == every_record


# I5


@settings(max_examples=30, deadline=None)
@given(case=cases(), num_epochs=st.integers(1, 5))
def test_views_of_any_two_records_differ_by_at_most_one(case: Case, num_epochs: int) -> None:
    views: Counter[tuple[int, int]] = Counter()
    turns: Counter[int] = Counter()
    for batch in epochs(case.order(), num_epochs):
        turns[batch.bucket] += 1
        views.update(zip(batch.shards.tolist(), batch.records.tolist(), strict=True))
    buckets = sorted({row[:2] for row in case.rows})
    for index, (width, height, _, first, count) in enumerate(case.rows):
        records = case.num_records()[width, height]
        for record in range(first, first + count):
            seen = turns[buckets.index((width, height))] * case.global_batch
            assert seen // records <= views[index, record] <= min(-(-seen // records), num_epochs)
            assert seen > num_epochs * records - case.global_batch


# I7


@pytest.mark.parametrize("num_shards", [50, 100, 400])
def test_a_rank_of_eight_rereads_its_own_eighth_of_the_shards(num_shards: int) -> None:
    case = one_bucket(num_shards, 512, window=2048)
    num_records = num_shards * 512
    for rank in (0, 3, 7):
        laps: list[list[int]] = [[] for _ in range(4)]
        for turn, batch in enumerate(epochs(case.order(), 4, rank=rank, world=8)):
            for lap, shard in zip(
                (turn * 64 + batch.positions) // num_records, batch.shards, strict=True
            ):
                laps[lap].append(int(shard))
        for reads, next_reads in pairwise(laps):
            own = set(reads)
            assert len(own) <= 0.14 * num_shards
            assert np.mean([shard in own for shard in next_reads]) >= 0.94


# I8


def large_table(num_buckets: int) -> ShardTable:
    shards = np.arange(100_000)
    buckets = tuple((512 + 8 * index, 512) for index in range(num_buckets))
    records = np.full_like(shards, 10_000)
    return ShardTable(shards % num_buckets, shards, np.zeros_like(shards), records, buckets)


@pytest.mark.parametrize("num_buckets", [1, 40])
def test_memory_grows_with_the_shards_alone(num_buckets: int) -> None:
    table = large_table(num_buckets)
    tracemalloc.start()
    try:
        order = StreamOrder(table, seed=1, global_batch=64)
        for epoch in range(3):
            # Around the border of two laps, both lines are in memory.
            list(order.batches(epoch, 0, 128))
            list(order.batches(epoch, order.steps(epoch) - 128, order.steps(epoch)))
        held_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held_bytes <= 40 * len(table) + 2 * 2**20


def test_a_plan_of_a_hundred_thousand_shards_takes_a_fifth_of_a_second() -> None:
    table = large_table(40)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        StreamOrder(table, seed=1, global_batch=64)
        seconds.append(time.process_time() - start)
    assert min(seconds) <= 0.2


# I9


def test_the_order_is_the_golden_one() -> None:
    build = runpy.run_path(str(GOLDEN / "stream_order.py"))["build"]
    assert build() == json.loads((GOLDEN / "stream_order.json").read_text())


# I10


def test_a_new_bucket_leaves_the_batches_of_the_others_alone() -> None:
    case = Case(((640, 512, 0, 0, 50), (640, 512, 1, 0, 30)), 4, 2, 8)
    grown = replace(case, rows=((512, 512, 0, 0, 9), *case.rows))
    batches = [b for b in epochs(grown.order(), 3) if b.bucket == 1]
    reads = [[(b.shards - 1).tolist(), b.records.tolist()] for b in batches]
    assert reads == [[b.shards.tolist(), b.records.tolist()] for b in epochs(case.order(), 3)]


def test_laps_and_seeds_differ_in_their_order() -> None:
    case = one_bucket(1, 64, global_batch=64, lanes=1)
    first, second = (b.records for b in epochs(case.order(), 2))
    other = next(epochs(replace(case, seed=2).order(), 1)).records
    orders = [first, second, other, np.arange(64)]
    assert len({tuple(order.tolist()) for order in orders}) == 4
