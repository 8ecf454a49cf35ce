"""What a order accepts, what it is identified by, and what it reports."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sdxl_distill.errors import ConfigError, IncompatibleError
from sdxl_distill.fingerprint import differing_fields
from sdxl_distill.order.stream_order import ShardTable, StreamOrder

SQUARE = (512, 512, 0, 1, 40)
TALL = (512, 640, 0, 0, 9)
SETTINGS = {"seed": 1, "global_batch": 12, "lanes": 4, "window": 32, "num_draws": 1}


def schedule_of(*rows: tuple[int, int, int, int, int], **settings: Any) -> StreamOrder:
    return StreamOrder(ShardTable.from_rows(rows or (SQUARE, TALL)), **(SETTINGS | settings))


def reads(order: StreamOrder) -> list[list[list[int]]]:
    return [
        [batch.shards.tolist(), batch.records.tolist()]
        for epoch in range(3)
        for batch in order.batches(epoch, 0, order.steps(epoch))
    ]


def test_lanes_are_taken_from_the_batch_alone_by_default() -> None:
    assert schedule_of(global_batch=96, lanes=None).lanes == 48


def test_lanes_that_do_not_divide_the_batch_are_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"5 lanes .* 12; expected one of \[1, 2, 3, 4, 6, 12\]"):
        schedule_of(lanes=5)


def test_a_world_that_does_not_divide_the_lanes_is_refused_at_the_call() -> None:
    with pytest.raises(ConfigError, match=r"3 processes for 4 lanes; expected one of \[1, 2, 4\]"):
        schedule_of().batches(0, 0, 1, rank=0, world=3)


@pytest.mark.parametrize(
    "wrong", [{"global_batch": 0}, {"window": 0}, {"num_draws": 0}, {"seed": -1}, {"seed": 2**64}]
)
def test_a_setting_out_of_range_is_refused_by_name(wrong: dict[str, int]) -> None:
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=f"{name} {value}"):
        schedule_of(**wrong)


def test_a_table_without_a_record_is_refused() -> None:
    with pytest.raises(ConfigError, match="none of 2 shards"):
        schedule_of((512, 512, 0, 9, 0), (512, 512, 1, 9, 0))


def test_a_table_without_a_row_is_refused_as_one_without_a_record() -> None:
    none = np.array([], dtype=np.int64)
    table = ShardTable(none, none, none, none, ((512, 512),))
    with pytest.raises(ConfigError, match="none of 0 shards"):
        StreamOrder(table, **SETTINGS)


@pytest.mark.parametrize(("epoch", "step", "stop"), [(-1, 0, 0), (0, -1, 1), (0, 0, 4), (0, 4, 4)])
def test_a_position_that_no_epoch_has_is_refused_at_the_call(
    epoch: int, step: int, stop: int
) -> None:
    order = schedule_of(SQUARE)
    with pytest.raises(IncompatibleError, match="of epoch"):
        order.batches(epoch, step, stop)


def test_a_negative_global_step_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="global step -1"):
        schedule_of().position_of(-1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 2), ("global_batch", 8), ("lanes", 2), ("window", 64), ("num_draws", 2)],
)
def test_every_setting_is_in_the_fingerprint(name: str, value: int) -> None:
    changed = schedule_of(**{name: value})
    assert changed.fingerprint() != schedule_of().fingerprint()
    assert differing_fields(changed.identity(), schedule_of().identity()) == [
        (name, value, SETTINGS[name])
    ]


@pytest.mark.parametrize(
    ("rows", "path"),
    [
        (((512, 512, 0, 0, 40), TALL), "buckets.512x512.shards_sha256"),
        (((512, 512, 3, 1, 40), TALL), "buckets.512x512.shards_sha256"),
        (((512, 512, 0, 1, 41), TALL), "buckets.512x512.num_records"),
        (((512, 512, 0, 1, 20), (512, 512, 1, 0, 20), TALL), "buckets.512x512.num_shards"),
        ((SQUARE,), "buckets.512x640"),
        (((448, 512, 0, 1, 40), TALL), "buckets.448x512"),
    ],
)
def test_whatever_changes_in_the_table_is_in_the_fingerprint(
    rows: tuple[tuple[int, int, int, int, int], ...], path: str
) -> None:
    changed = schedule_of(*rows)
    assert changed.fingerprint() != schedule_of().fingerprint()
    differences = differing_fields(changed.identity(), schedule_of().identity())
    assert path in [field for field, *_ in differences]


def test_shards_without_a_record_change_neither_order_nor_fingerprint() -> None:
    grown = schedule_of(SQUARE, TALL, (512, 512, 1, 30, 0), (384, 384, 0, 30, 0))
    assert grown.fingerprint() == schedule_of().fingerprint()
    assert reads(grown) == reads(schedule_of())


def test_the_order_of_rows_in_the_table_means_nothing() -> None:
    rows = [(side, 512, number, 1, 20) for side in (768, 512) for number in range(3)]
    order, turned = schedule_of(*rows), schedule_of(*rows[::-1])
    assert turned.fingerprint() == order.fingerprint()
    last = len(rows) - 1
    assert reads(order) == [
        [[last - shard for shard in shards], records] for shards, records in reads(turned)
    ]


def test_the_report_names_buckets_smaller_than_a_batch() -> None:
    square, tall = schedule_of().describe()
    assert (square.bucket, square.num_shards, square.num_records) == ((512, 512), 1, 40)
    assert (square.num_steps, square.smaller_than_batch) == (3, False)
    assert (tall.num_records, tall.num_steps, tall.smaller_than_batch) == (9, 0, True)
    assert schedule_of().describe(epoch=1)[1].num_steps == 1


def test_all_columns_are_int64() -> None:
    batch = next(schedule_of().batches(0, 0, 1))
    columns = (batch.shards, batch.records, batch.draws, batch.positions)
    assert [column.dtype for column in columns] == [np.dtype(np.int64)] * 4
