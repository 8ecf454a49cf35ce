"""The stream order: which records each rank reads at each step, by integer arithmetic alone.

In: the shard table, a seed and the sizes of batch, lanes and window. Out: batches of (shard,
record, draw), the same for every world size. The whole state is (epoch, step). Formulas:
docs/determinism.md, "Stream order".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sdxl_distill.errors import ConfigError, IncompatibleError
from sdxl_distill.fingerprint import fingerprint
from sdxl_distill.order.lane import Lanes, default_lanes
from sdxl_distill.order.lap import Lines
from sdxl_distill.order.permutation import Int64s, UInt64s
from sdxl_distill.order.shard_table import ShardTable
from sdxl_distill.order.step_order import StepOrder

__all__ = ["BucketSteps", "PlannedBatch", "ShardTable", "StreamOrder", "default_lanes"]

STREAM_ORDER = "laps-1"
"""Version of the algorithm; another version means another order for the same seed."""

_STEPS_AT_ONCE = 64
_WHERE = "stream order"


class PlannedBatch(NamedTuple):
    """What one rank reads for one step; arrays are int64 [B], B = G/R.

    Micro-batches are consecutive pieces.
    """

    epoch: int
    step: int
    bucket: int
    """Index into `ShardTable.buckets`, the same on all ranks."""
    shards: Int64s
    """Rows of the shard table."""
    records: Int64s
    """Positions in the shard, `first` included."""
    draws: Int64s
    """0 … num_draws − 1."""
    positions: Int64s
    """Positions in the global batch, ascending."""


@dataclass(frozen=True)
class BucketSteps:
    """One bucket's part in an epoch, for reports."""

    bucket: tuple[int, int]
    num_shards: int
    num_records: int
    num_steps: int
    smaller_than_batch: bool
    """It has no step in some epochs: records are carried over until a batch is full."""


class StreamOrder:
    """The stream order of a shard table.

    Args:
        table: the joined shards.
        seed: 0 … 2⁶⁴ − 1.
        global_batch: G, records per optimizer step over all ranks.
        lanes: C, a divisor of G and a multiple of every future world size; None is
            `default_lanes(G)`.
        window: W, number of records of a bucket that are mixed with each other.
        num_draws: D, the draws that all sets have; lap q reads draw q mod D.

    Raises:
        ConfigError: when a number is out of range, C does not divide G, or no shard has a record.
    """

    def __init__(
        self,
        table: ShardTable,
        *,
        seed: int,
        global_batch: int,
        lanes: int | None = None,
        window: int = 16384,
        num_draws: int = 1,
    ) -> None:
        _check_settings(seed, global_batch, window, num_draws)
        self.table = table
        self.seed = seed
        self.global_batch = global_batch
        self.lanes = default_lanes(global_batch) if lanes is None else lanes
        self.window = window
        self.num_draws = num_draws
        # By size, not by index: a bucket that is added later must not reorder the others.
        self._codes: UInt64s = np.array(
            [(width << 32) + height for width, height in table.buckets], dtype=np.uint64
        )
        self._lanes = Lanes(self.lanes, global_batch=global_batch, window=window, seed=seed)
        self._lines = Lines(
            table, self._codes, seed=seed, lanes=self.lanes, num_mixed=self._lanes.num_mixed
        )
        self._num_records = self._lines.num_records
        if not self._num_records.any():
            raise ConfigError(
                f"none of {len(table)} shards has a record to stream",
                expected="at least one record",
                where=_WHERE,
                action="build more shards, or lower `training.validation.fraction`",
            )
        self._step_order = StepOrder(
            self._num_records, self._codes, seed=seed, global_batch=global_batch
        )

    def steps(self, epoch: int) -> int:
        """Return the number of steps of an epoch, which may be 0."""
        return int(self._step_order.turns_of(epoch).sum())

    def global_step(self, epoch: int, step: int) -> int:
        """Return how many steps come before a position, over all epochs.

        Raises:
            IncompatibleError: when the epoch has fewer steps.
        """
        self._check_position(epoch, step)
        return self._step_order.steps_before(epoch) + step

    def position_of(self, global_step: int) -> tuple[int, int]:
        """Return (epoch, step) of a global step: the inverse of `global_step`.

        Never a position in an empty epoch or after an epoch's last step.

        Raises:
            IncompatibleError: when it is negative.
        """
        if global_step < 0:
            raise IncompatibleError(
                f"global step {global_step}", expected="0 or more", where=_WHERE
            )
        epoch = self._step_order.epoch_of(global_step)
        return epoch, global_step - self._step_order.steps_before(epoch)

    def batches(
        self, epoch: int, step: int, stop: int, *, rank: int = 0, world: int = 1
    ) -> Iterator[PlannedBatch]:
        """Return the batches of one rank for steps `step … stop − 1` of an epoch.

        64 steps are computed at once; arguments are checked at the call.

        Raises:
            ConfigError: when the world does not divide the lanes.
            IncompatibleError: when the epoch has fewer steps.
        """
        positions = self._lanes.positions(rank, world)
        self._check_position(epoch, step)
        self._check_position(epoch, stop)
        return (
            batch
            for start in range(step, stop, _STEPS_AT_ONCE)
            for batch in self._look_up(epoch, start, min(start + _STEPS_AT_ONCE, stop), positions)
        )

    def num_shards_in_use(self, world: int = 1) -> int:
        """Return how many shards, of all buckets, a rank reads from at once, each draw counted.

        Steps of all buckets take turns, and a window of a bucket lasts for thousands of them. A
        batch of a bucket smaller than itself takes several laps of it, each of another draw.

        Raises:
            ConfigError: when the world does not divide the lanes.
        """
        self._lanes.positions(0, world)
        table = self.table
        num_shards = np.bincount(table.bucket[table.count > 0], minlength=len(table.buckets))
        in_use = self._lanes.num_shards_in_use(self._num_records, num_shards, world)
        laps = -(-self.global_batch // np.maximum(self._num_records, 1))
        return int((in_use * np.minimum(laps, self.num_draws)).sum())

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the order, as JSON; for `differing_fields`."""
        return {
            "stream_order": STREAM_ORDER,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "lanes": self.lanes,
            "window": self.window,
            "num_draws": self.num_draws,
            "buckets": {
                f"{width}x{height}": self._bucket_identity(bucket)
                for bucket, (width, height) in enumerate(self.table.buckets)
                if self._num_records[bucket]
            },
        }

    def fingerprint(self) -> str:
        """Return the SHA-256 of `identity()` as 64 hex digits."""
        return fingerprint(self.identity())

    def describe(self, epoch: int = 0) -> tuple[BucketSteps, ...]:
        """Return the part that each bucket of the table has in an epoch."""
        num_shards = np.bincount(self.table.bucket, minlength=len(self.table.buckets))
        num_steps = self._step_order.turns_of(epoch)
        return tuple(
            BucketSteps(
                bucket=bucket,
                num_shards=int(num_shards[index]),
                num_records=int(self._num_records[index]),
                num_steps=int(num_steps[index]),
                smaller_than_batch=bool(self._num_records[index] < self.global_batch),
            )
            for index, bucket in enumerate(self.table.buckets)
        )

    def _look_up(
        self, epoch: int, step: int, stop: int, positions: Int64s
    ) -> Iterator[PlannedBatch]:
        bucket, turn = self._step_order.turns(epoch, step, stop)
        # Sorted by bucket, so that turns of one bucket are looked up together.
        by_bucket = np.argsort(bucket, kind="stable")
        num_records = self._num_records[bucket[by_bucket], np.newaxis]
        place = turn[by_bucket, np.newaxis] * self.global_batch + positions
        lap = place // num_records
        codes = self._codes[bucket[by_bucket], np.newaxis]
        on_line = self._lanes.place_on_line(place, lap, num_records, codes, positions)
        rows, records = self._lines.locate(bucket[by_bucket], lap, on_line)
        draws = lap % self.num_draws
        for at, computed_at in enumerate(np.argsort(by_bucket).tolist()):
            yield PlannedBatch(
                epoch,
                step + at,
                int(bucket[at]),
                rows[computed_at],
                records[computed_at],
                draws[computed_at],
                positions,
            )

    def _bucket_identity(self, bucket: int) -> dict[str, Any]:
        table = self.table
        rows = np.flatnonzero((table.bucket == bucket) & (table.count > 0))
        rows = rows[np.argsort(table.number[rows])]
        columns = np.stack([table.number[rows], table.first[rows], table.count[rows]])
        return {
            "num_shards": rows.size,
            "num_records": int(self._num_records[bucket]),
            "shards_sha256": hashlib.sha256(columns.astype("<i8").tobytes()).hexdigest(),
        }

    def _check_position(self, epoch: int, step: int) -> None:
        if epoch < 0 or not 0 <= step <= self.steps(epoch):
            raise IncompatibleError(
                f"step {step} of epoch {epoch}",
                expected=f"step 0 … {self.steps(max(epoch, 0))} of an epoch from 0 on",
                where=_WHERE,
                action="resume with the data and batch size of the checkpoint",
            )


def _check_settings(seed: int, global_batch: int, window: int, num_draws: int) -> None:
    sizes = {"global_batch": global_batch, "window": window, "num_draws": num_draws}
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} {size}", expected="1 or more", where=_WHERE)
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed {seed}", expected="0 … 2**64 - 1", where=_WHERE)
