"""Lanes: C equal slices of every lap; ranks own lanes, so no world size changes the order.

Place P of a bucket's endless line belongs to lane P mod C. A lane reads one stretch of the line of
the lap, in permuted windows, from a start that differs by lap. See docs/determinism.md, "Lanes".
"""

from __future__ import annotations

import numpy as np

from sdxl_distill.errors import ConfigError
from sdxl_distill.order.permutation import Int64s, Purpose, UInt64s, derive, permute

_MAX_DEFAULT_LANES = 64


def default_lanes(global_batch: int) -> int:
    """Return the largest divisor of the global batch up to 64, whatever the world size."""
    return max(_divisors(global_batch, _MAX_DEFAULT_LANES))


class Lanes:
    """The lanes of every bucket.

    Args:
        num_lanes: C.
        global_batch: G.
        window: W, number of records that are mixed with each other, over all lanes.
        seed: the stream order's seed.

    Raises:
        ConfigError: when C does not divide G.
    """

    def __init__(self, num_lanes: int, *, global_batch: int, window: int, seed: int) -> None:
        if num_lanes < 1 or global_batch % num_lanes:
            raise ConfigError(
                f"{num_lanes} lanes for a global batch of {global_batch}",
                expected=f"one of {_divisors(global_batch, global_batch)}",
                where="stream order",
                action="set `data.lanes` to one of these, or leave it out",
            )
        self.num_lanes = num_lanes
        self._global_batch = global_batch
        records_per_lane = -(-max(window, global_batch) // num_lanes)
        self._window = 1 << (records_per_lane - 1).bit_length()
        self._key = derive(seed, Purpose.LANE)

    @property
    def num_mixed(self) -> int:
        """Records of a bucket that one window of all lanes mixes with each other."""
        return self._window * self.num_lanes

    def positions(self, rank: int, world: int) -> Int64s:
        """Return the positions [G/R] of the global batch whose lanes a rank owns, ascending.

        Raises:
            ConfigError: when the world does not divide the lanes, or the rank is not in it.
        """
        if world < 1 or self.num_lanes % world:
            raise ConfigError(
                f"{world} processes for {self.num_lanes} lanes",
                expected=f"one of {_divisors(self.num_lanes, self.num_lanes)} processes",
                where="stream order",
                action="start another number of processes, or set `data.lanes` to a multiple of it "
                f"that divides the global batch of {self._global_batch} (this changes the order)",
            )
        if not 0 <= rank < world:
            raise ConfigError(
                f"rank {rank} of {world}", expected="0 <= rank < world", where="stream order"
            )
        lanes_per_rank = self.num_lanes // world
        own = np.arange(rank * lanes_per_rank, (rank + 1) * lanes_per_rank)
        return np.add.outer(np.arange(0, self._global_batch, self.num_lanes), own).reshape(-1)

    def num_shards_in_use(self, num_records: Int64s, num_shards: Int64s, world: int) -> Int64s:
        """Return the most shards of each bucket that the windows of a rank's lanes lie in.

        Args:
            num_records: [buckets], n of each bucket.
            num_shards: [buckets], shards of each bucket that have a record.
            world: number of ranks, which divides C.
        """
        in_lane = np.minimum(self._window, -(-num_records // self.num_lanes))
        # A stretch as long as k shards touches up to k + 1, and a lane that wraps around one more.
        per_lane = -(-in_lane * num_shards // np.maximum(num_records, 1)) + 2
        return np.minimum(num_shards, self.num_lanes // world * per_lane)

    def place_on_line(
        self, place: Int64s, lap: Int64s, num_records: Int64s, code: UInt64s, positions: Int64s
    ) -> Int64s:
        """Map places of the endless line to places on the line of their lap; one-to-one in a lap.

        Args:
            place: [T, B], places of T turns.
            lap: [T, B], place // n.
            num_records: [T, 1], n of the turn's bucket.
            code: [T, 1], number that stands for the bucket in hashes.
            positions: [B].

        Returns:
            [T, B], 0 ≤ place on the line < n.
        """
        lane = positions % self.num_lanes
        rounds, rest = np.divmod(lap * num_records, self.num_lanes)
        next_rounds, next_rest = np.divmod((lap + 1) * num_records, self.num_lanes)
        # The first `rest` lanes have had one place more than the others so far.
        places_before = rounds + (lane < rest)
        length = next_rounds + (lane < next_rest) - places_before
        stretch = lane * (next_rounds - rounds)
        stretch += np.minimum(lane, next_rest) - np.minimum(lane, rest)

        offset = place // self.num_lanes - places_before
        in_window = offset % self._window
        window = offset - in_window
        key = derive(self._key, code, lap, lane)
        permuted = permute(
            in_window.reshape(-1),
            np.minimum(self._window, length - window).reshape(-1),
            (key + window.astype(np.uint64)).reshape(-1),
        ).reshape(place.shape)
        # Lanes shorter than a shard would repeat their coarse order if the start did not differ.
        start = (key % length.astype(np.uint64)).astype(np.int64)
        return stretch + (window + permuted + start) % length


def _divisors(number: int, highest: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, highest) + 1) if number % divisor == 0]
