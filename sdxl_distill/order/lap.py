"""The line of a lap: all records of a bucket, shard after shard, and the look-up on it.

Shards stay in home lanes, so that a rank reads nearly the same shards in every lap; if all shards
were permuted again each time, most of its records would come from shards it has not seen. See
docs/determinism.md, "Line of a lap".
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdxl_distill.order.permutation import Int64s, Purpose, UInt64s, derive
from sdxl_distill.order.shard_table import ShardTable


class Line(NamedTuple):
    """Shards in the order of one lap."""

    rows: NDArray[np.int32]
    """[S_b] rows of the shard table; int32, because only this state grows with the data."""
    ends: Int64s
    """[S_b] place after each shard's last record; the last of them is n."""


class Lines:
    """The lines of all buckets and laps.

    Args:
        table: the joined shards; those without a record are left out.
        codes: uint64 [buckets], numbers that stand for the buckets in hashes.
        seed: the stream order's seed.
        lanes: C.
        num_mixed: M · C, number of records that one window of all lanes mixes anyway; a bucket of
            no more records has the same line in every lap.
    """

    def __init__(
        self, table: ShardTable, codes: UInt64s, *, seed: int, lanes: int, num_mixed: int
    ) -> None:
        self._table = table
        self._codes = codes
        self._lanes = lanes
        self._lap_key = derive(seed, Purpose.LAP)
        shard_keys = derive(seed, Purpose.SHARD, codes)
        self._steady = [
            _steady_line(table, rows, shard_keys[bucket : bucket + 1])
            for bucket, rows in enumerate(_rows_by_bucket(table))
        ]
        self.num_records: Int64s = np.array(
            [line.ends[-1] if line.ends.size else 0 for line in self._steady], dtype=np.int64
        )
        """[buckets] n of each bucket."""
        self._is_steady = self.num_records <= num_mixed
        self._recent: dict[int, tuple[tuple[int, Line], ...]] = {}

    def locate(self, bucket: Int64s, lap: Int64s, place: Int64s) -> tuple[Int64s, Int64s]:
        """Find the record at each place of its bucket's line in its lap.

        Neighbours of one bucket and lap are looked up together, so sort by both.

        Args:
            bucket: int64 [T], indices of buckets.
            lap: int64 [T, B], number of the lap.
            place: int64 [T, B], place on the line, 0 ≤ place < n.

        Returns:
            row of the shard table [T, B] and record in that shard [T, B], int64.
        """
        # Flat columns; a steady bucket has the line of lap 0 in every lap.
        buckets = np.repeat(bucket, place.shape[1])
        laps = np.where(self._is_steady[bucket, np.newaxis], 0, lap).ravel()
        places = place.ravel()
        row = np.empty_like(places)
        end = np.empty_like(places)

        # One search for each stretch of one bucket and lap.
        cuts = np.flatnonzero((np.diff(buckets) != 0) | (np.diff(laps) != 0)) + 1
        for start, stop in pairwise([0, *cuts.tolist(), places.size]):
            line = self.line(int(buckets[start]), int(laps[start]))
            at = np.searchsorted(line.ends, places[start:stop], side="right")
            row[start:stop] = line.rows[at]
            end[start:stop] = line.ends[at]

        # `end` is the place after the shard's last record.
        record = self._table.first[row] + places - (end - self._table.count[row])
        return row.reshape(place.shape), record.reshape(place.shape)

    def line(self, bucket: int, lap: int) -> Line:
        """Return the shards of a bucket in the order of a lap; the last two laps are kept."""
        if self._is_steady[bucket]:
            return self._steady[bucket]
        recent = self._recent.get(bucket, ())
        for known_lap, line in recent:
            if known_lap == lap:
                return line
        line = self._line_of_lap(bucket, lap)
        # One assignment of a complete value: threads may share this object without a lock.
        self._recent[bucket] = (*recent[-1:], (lap, line))
        return line

    def _line_of_lap(self, bucket: int, lap: int) -> Line:
        """Return the steady line with the shards of each home lane shuffled."""
        steady = self._steady[bucket]
        count = self._table.count[steady.rows]
        middle = steady.ends - count + count // 2
        home = middle * self._lanes // self.num_records[bucket]
        number = self._table.number[steady.rows]
        # Hashes are distinct, so this sort need not be stable; the next one must be.
        shuffled = np.argsort(derive(self._lap_key, self._codes[bucket : bucket + 1], lap, number))
        short = home.astype(np.min_scalar_type(self._lanes))
        shuffled = shuffled[np.argsort(short[shuffled], kind="stable")]
        return Line(steady.rows[shuffled], np.cumsum(count[shuffled]))


def _rows_by_bucket(table: ShardTable) -> list[NDArray[np.int32]]:
    """Return the rows of each bucket whose shards have a record, in one pass over the table."""
    rows = table.by_bucket().astype(np.int32)
    sizes = np.bincount(table.bucket, minlength=len(table.buckets))
    return [own[table.count[own] > 0] for own in np.split(rows, np.cumsum(sizes)[:-1])]


def _steady_line(table: ShardTable, rows: NDArray[np.int32], key: UInt64s) -> Line:
    """Sort the shards by a hash of their number: new ones fall in between, old ones keep order."""
    rows = rows[np.argsort(derive(key, table.number[rows]))]
    return Line(rows, np.cumsum(table.count[rows]))
