from __future__ import annotations

import numpy as np
import pytest

from sdxl_distill.errors import ConfigError
from sdxl_distill.order.shard_table import ShardTable

COLUMN = np.array([0, 1])
BUCKETS = ((512, 512), (512, 768))


def test_rows_keep_their_places_and_buckets_are_sorted() -> None:
    table = ShardTable.from_rows([(896, 1152, 4, 1, 9), (640, 1536, 0, 0, 7), (896, 1152, 3, 2, 8)])
    assert table.buckets == ((640, 1536), (896, 1152))
    assert table.bucket.tolist() == [1, 0, 1]
    assert table.number.tolist() == [4, 0, 3]
    assert table.first.tolist() == [1, 0, 2]
    assert table.count.tolist() == [9, 7, 8]
    assert len(table) == 3


def test_columns_are_int64_copies_that_cannot_be_written() -> None:
    count = np.array([3, 4])
    table = ShardTable(COLUMN, COLUMN, COLUMN, count, BUCKETS)
    count[0] = 100
    assert table.count.tolist() == [3, 4] and table.count.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        table.count[0] = 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no shard"),
        ([(512, 512, 0, 0)], "shape"),
        ([(512, 512, 0, 0, 1.5)], "float64"),
        ([(512, 512, 0, 0, -1)], "count holds -1"),
        ([(512, 512, 0, -1, 1)], "first holds -1"),
        ([(512, 512, -1, 0, 1)], "number holds -1"),
        ([(0, 512, 0, 0, 1)], "buckets"),
        ([(512, 512, 1 << 40, 0, 1)], "number 1099511627776"),
        ([(side, side, 0, 0, 1) for side in range(1, 65_538)], "65537 buckets"),
        ([(512, 512, 7, 0, 1), (512, 512, 7, 3, 1)], "shard 7 of bucket 512x512 is there twice"),
        (
            [(512, 512, 7, 0, 1), (64, 64, 7, 0, 1), (512, 512, 3, 0, 1), (512, 512, 7, 0, 1)],
            "shard 7 of bucket 512x512 is there twice",
        ),
    ],
)
def test_a_bad_row_is_refused(rows: list[tuple[int, int, int, int, int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ShardTable.from_rows(rows)


@pytest.mark.parametrize(
    ("bucket", "count", "buckets", "message"),
    [
        (COLUMN, np.array([1]), BUCKETS, "columns of"),
        (COLUMN, np.array([[1, 1]]), BUCKETS, "one dimension"),
        (np.array([0, 2]), COLUMN, BUCKETS, "bucket index 2"),
        (np.array([-1, 0]), COLUMN, BUCKETS, "bucket holds -1"),
        (COLUMN, COLUMN, BUCKETS[::-1], "ascending"),
        (COLUMN, COLUMN, (), "0 buckets"),
    ],
)
def test_a_bad_column_is_refused(
    bucket: np.ndarray, count: np.ndarray, buckets: tuple[tuple[int, int], ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ShardTable(bucket, COLUMN, COLUMN, count, buckets)
