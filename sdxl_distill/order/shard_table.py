"""The shard table: one row per joined shard, all that the stream order knows of the files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdxl_distill.errors import ConfigError
from sdxl_distill.limits import MAX_BUCKETS
from sdxl_distill.order.permutation import Int64s

_WHERE = "shard table"
_NUMBER_BITS = 40


@dataclass(frozen=True, eq=False)
class ShardTable:
    """Columns [S] of the shards that all joined sets have, in any order of rows.

    Attributes:
        bucket: index into `buckets`.
        number: the shard's number in its bucket.
        first: position of the first record that is streamed.
        count: number of records that are streamed; 0 is legal.
        buckets: (width, height) in pixels, strictly ascending.

    Raises:
        ConfigError: when the columns are not integers, differ in length, are out of range or name
            a shard twice.
    """

    bucket: Int64s
    number: Int64s
    first: Int64s
    count: Int64s
    buckets: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        for name in ("bucket", "number", "first", "count"):
            object.__setattr__(self, name, _column(name, getattr(self, name)))
        _check_buckets(self.buckets)
        lengths = {self.bucket.size, self.number.size, self.first.size, self.count.size}
        if len(lengths) > 1:
            raise ConfigError(
                f"columns of {sorted(lengths)} rows", expected="equal lengths", where=_WHERE
            )
        if self.bucket.max(initial=0) >= len(self.buckets):
            raise ConfigError(
                f"bucket index {self.bucket.max()}",
                expected=f"less than {len(self.buckets)}",
                where=_WHERE,
            )
        if self.number.max(initial=0) >> _NUMBER_BITS:
            raise ConfigError(
                f"shard number {self.number.max()}",
                expected=f"less than {1 << _NUMBER_BITS}",
                where=_WHERE,
            )
        self._check_unique()

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[int, int, int, int, int]]) -> ShardTable:
        """Build the table from (width, height, number, first, count); row i is the i-th given.

        Raises:
            ConfigError: as the class; also when there is no row.
        """
        columns = np.array(list(rows))
        if columns.size == 0:
            raise ConfigError("no shard", expected="at least one", where=_WHERE)
        if columns.ndim != 2 or columns.shape[1] != 5:
            raise ConfigError(
                f"rows of shape {columns.shape}",
                expected="width, height, number, first, count",
                where=_WHERE,
            )
        labels, bucket = np.unique(columns[:, :2], axis=0, return_inverse=True)
        buckets = tuple((int(width), int(height)) for width, height in labels)
        number, first, count = columns[:, 2:].T
        return cls(bucket.reshape(-1), number, first, count, buckets)

    def __len__(self) -> int:
        return self.bucket.size

    def by_bucket(self) -> Int64s:
        """Return the rows bucket by bucket, in their own order within each; [S]."""
        bits16 = self.bucket.astype(np.uint16)  # numpy sorts these in linear time
        return np.argsort(bits16, kind="stable")

    def _check_unique(self) -> None:
        names = (self.bucket << _NUMBER_BITS | self.number)[self.by_bucket()]
        if not (names[1:] > names[:-1]).all():  # numbers are mostly in order already
            names.sort()
        twice = names[1:][names[1:] == names[:-1]]
        if twice.size:
            bucket, number = divmod(int(twice[0]), 1 << _NUMBER_BITS)
            width, height = self.buckets[bucket]
            raise ConfigError(
                f"shard {number} of bucket {width}x{height} is there twice",
                expected="each shard once",
                where=_WHERE,
            )


def _column(name: str, values: ArrayLike) -> Int64s:
    """Return a read-only int64 copy of one column."""
    column: NDArray[np.generic] = np.asarray(values)
    if column.ndim != 1 or column.dtype.kind not in "iu":
        raise ConfigError(
            f"column {name} is {column.dtype} of shape {column.shape}",
            expected="integers in one dimension",
            where=_WHERE,
        )
    integers = column.astype(np.int64)
    if integers.min(initial=0) < 0:
        raise ConfigError(
            f"column {name} holds {integers.min()}", expected="0 or more", where=_WHERE
        )
    integers.setflags(write=False)
    return integers


def _check_buckets(buckets: tuple[tuple[int, int], ...]) -> None:
    if not 0 < len(buckets) <= MAX_BUCKETS:
        raise ConfigError(f"{len(buckets)} buckets", expected=f"1 to {MAX_BUCKETS}", where=_WHERE)
    ascending = all(left < right for left, right in pairwise(buckets))
    in_range = all(0 < side < 2**31 for bucket in buckets for side in bucket)
    if not (ascending and in_range):
        raise ConfigError(
            f"buckets {buckets}",
            expected="(width, height) in pixels, strictly ascending",
            where=_WHERE,
        )
