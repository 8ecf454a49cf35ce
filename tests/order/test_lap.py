from __future__ import annotations

import numpy as np
from hypothesis import given, settings, strategies as st

from sdxl_distill.order.lap import Lines
from sdxl_distill.order.permutation import Purpose, derive
from sdxl_distill.order.shard_table import ShardTable

SEED = 11
CODES = np.array([700, 900], dtype=np.uint64)


def table_of(counts: list[list[int]]) -> ShardTable:
    """Return a table of two buckets; shard numbers ascend by three, the first record by one."""
    rows = [
        (512, 512 + 128 * bucket, 3 * index, index, count)
        for bucket, shard_counts in enumerate(counts)
        for index, count in enumerate(shard_counts)
    ]
    return ShardTable.from_rows(rows)


def lines_of(table: ShardTable, lanes: int = 4, num_mixed: int = 0) -> Lines:
    return Lines(table, CODES[: len(table.buckets)], seed=SEED, lanes=lanes, num_mixed=num_mixed)


def records_by_list(
    table: ShardTable, bucket: int, lap: int, lanes: int, num_mixed: int
) -> list[tuple[int, int]]:
    """Lay all records of a bucket on the line of a lap, one by one."""
    code = int(CODES[bucket])

    def hash_of(row: int, *purpose: int) -> int:
        return int(derive(SEED, *purpose, int(table.number[row]))[0])

    rows = [row for row in range(len(table)) if table.bucket[row] == bucket and table.count[row]]
    rows.sort(key=lambda row: hash_of(row, Purpose.SHARD, code))
    num_records = sum(int(table.count[row]) for row in rows)
    if num_records > num_mixed:
        homes, start = {}, 0
        for row in rows:
            count = int(table.count[row])
            homes[row] = (start + count // 2) * lanes // num_records
            start += count
        rows.sort(key=lambda row: (homes[row], hash_of(row, Purpose.LAP, code, lap)))
    return [
        (row, int(table.first[row]) + record)
        for row in rows
        for record in range(int(table.count[row]))
    ]


counts = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@settings(deadline=None)
@given(
    counts=st.lists(counts, min_size=1, max_size=2),
    lanes=st.sampled_from([1, 2, 5, 64]),
    num_mixed=st.sampled_from([0, 20, 1000]),
    laps=st.lists(st.integers(0, 10**6), min_size=1, max_size=4),
)
def test_every_place_holds_the_record_that_a_list_has_there(
    counts: list[list[int]], lanes: int, num_mixed: int, laps: list[int]
) -> None:
    table = table_of(counts)
    lines = lines_of(table, lanes, num_mixed)
    for bucket, lap in [(bucket, lap) for bucket in range(len(counts)) for lap in laps]:
        expected = records_by_list(table, bucket, lap, lanes, num_mixed)
        assert lines.num_records[bucket] == len(expected)
        places = np.arange(len(expected))[:, np.newaxis]
        buckets = np.full(len(expected), bucket)
        rows, records = lines.locate(buckets, np.full_like(places, lap), places)
        assert list(zip(rows[:, 0].tolist(), records[:, 0].tolist(), strict=True)) == expected


def test_one_look_up_may_meet_many_buckets_and_laps() -> None:
    lines = lines_of(table_of([[5, 6, 7], [8, 9]]))
    bucket = np.array([1, 0, 1, 0])
    lap = np.array([[0, 1, 2], [7, 7, 8], [1, 2, 2], [9, 9, 9]])
    place = np.array([[16, 0, 3], [17, 1, 2], [3, 4, 5], [6, 0, 11]])
    rows, records = lines.locate(bucket, lap, place)
    for at in np.ndindex(place.shape):
        alone = lines_of(table_of([[5, 6, 7], [8, 9]])).locate(
            bucket[at[0] : at[0] + 1], lap[at].reshape(1, 1), place[at].reshape(1, 1)
        )
        assert (rows[at], records[at]) == tuple(column.item() for column in alone)


def test_shards_keep_to_their_home_lanes_and_are_shuffled_within() -> None:
    lines = lines_of(table_of([[10] * 64]), lanes=8)
    first, second = lines.line(0, 0).rows.reshape(8, 8), lines.line(0, 1).rows.reshape(8, 8)
    assert (np.sort(first, axis=1) == np.sort(second, axis=1)).all()
    assert (first != second).any(axis=1).all()


def test_a_bucket_that_the_window_covers_has_one_line_for_all_laps() -> None:
    lines = lines_of(table_of([[10] * 64]), num_mixed=640)
    assert lines.line(0, 0) is lines.line(0, 5)


def test_the_lines_of_two_laps_are_kept() -> None:
    lines = lines_of(table_of([[10] * 64]))
    kept = [lines.line(0, 0), lines.line(0, 1)]
    assert all(lines.line(0, lap) is line for lap, line in enumerate(kept))


@settings(deadline=None)
@given(num_old=st.integers(1, 20), num_new=st.integers(1, 20))
def test_appended_shards_keep_the_order_of_the_old_ones(num_old: int, num_new: int) -> None:
    old = lines_of(table_of([[4] * num_old]), num_mixed=10**6).line(0, 0).rows
    grown = lines_of(table_of([[4] * (num_old + num_new)]), num_mixed=10**6).line(0, 0).rows
    assert grown[grown < num_old].tolist() == old.tolist()
