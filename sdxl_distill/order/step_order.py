"""The order of steps: which bucket each step of an epoch takes, and which of its turns.

An epoch is cut into balanced blocks of about 4,096 steps and each block is shuffled: a full list
of steps would cost gigabytes, a bijection over all of them would lose balance and locality. See
docs/determinism.md, "Steps".
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from sdxl_distill.order.permutation import Int64s, Purpose, UInt64s, derive, shuffled

_STEPS_PER_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class _Block:
    epoch: int
    start: int
    bucket: Int64s
    turn: Int64s

    @property
    def stop(self) -> int:
        return self.start + self.bucket.size


class StepOrder:
    """Bucket and turn of every step.

    Turn v of a bucket is its v-th global batch since epoch 0. A bucket of n records has the turns
    ⌊en/G⌋ … ⌊(e+1)n/G⌋ − 1 in epoch e: one pass over the images; what does not fill a batch is
    carried over.

    Args:
        num_records: int64 [buckets], n of each bucket.
        codes: uint64 [buckets], numbers that stand for the buckets in hashes.
        seed: the stream order's seed.
        global_batch: G.
    """

    def __init__(
        self, num_records: Int64s, codes: UInt64s, *, seed: int, global_batch: int
    ) -> None:
        self._num_records = num_records
        self._codes = codes
        self._phase_key = derive(seed, Purpose.PHASE)
        self._block_key = derive(seed, Purpose.BLOCK)
        self._global_batch = global_batch
        self._recent = _Block(-1, 0, num_records[:0], num_records[:0])

    def first_turns(self, epoch: int) -> Int64s:
        """Return the turn [buckets] with which each bucket starts an epoch."""
        return epoch * self._num_records // self._global_batch

    def turns_of(self, epoch: int) -> Int64s:
        """Return how many turns [buckets] each bucket has in an epoch."""
        return self.first_turns(epoch + 1) - self.first_turns(epoch)

    def steps_before(self, epoch: int) -> int:
        """Return the number of steps in all earlier epochs."""
        return int(self.first_turns(epoch).sum())

    def epoch_of(self, global_step: int) -> int:
        """Return the epoch that holds a global step; empty epochs hold none."""
        num_records = int(self._num_records.sum())
        # Each bucket carries over less than one batch, which brackets the epoch.
        lowest = global_step * self._global_batch // num_records
        steps_reached = global_step + self._num_records.size
        highest = steps_reached * self._global_batch // num_records + 1
        epochs = range(lowest, highest)
        return lowest + bisect_right(epochs, global_step, key=self.steps_before) - 1

    def turns(self, epoch: int, step: int, stop: int) -> tuple[Int64s, Int64s]:
        """Return bucket [stop − step] and turn [stop − step] of the steps of an epoch.

        Args:
            epoch: 0 or more.
            step: first step, 0 ≤ step < stop.
            stop: step after the last one, at most the steps of the epoch.
        """
        bucket: list[Int64s] = []
        turn: list[Int64s] = []
        while step < stop:
            block = self._block(epoch, step)
            piece = slice(step - block.start, stop - block.start)
            bucket.append(block.bucket[piece])
            turn.append(block.turn[piece])
            step = block.stop
        return np.concatenate(bucket), np.concatenate(turn)

    def _block(self, epoch: int, step: int) -> _Block:
        """Return the block that holds a step; the last one is kept."""
        recent = self._recent
        if recent.epoch == epoch and recent.start <= step < recent.stop:
            return recent
        num_turns = self.turns_of(epoch)
        num_blocks = max(1, int(num_turns.sum()) // _STEPS_PER_BLOCK)
        # The phase spreads buckets of few turns; without it they would always come last.
        phase = derive(self._phase_key, epoch, self._codes) % np.uint64(num_blocks)
        phase = phase.astype(np.int64)

        def turns_before(block: int) -> Int64s:
            return (block * num_turns + phase) // num_blocks

        def start_of(block: int) -> int:
            return int(turns_before(block).sum())

        number = bisect_right(range(num_blocks), step, key=start_of) - 1
        before = turns_before(number)
        lengths = turns_before(number + 1) - before
        permutation = shuffled(derive(self._block_key, epoch, number), int(lengths.sum()))
        bucket = np.repeat(np.arange(lengths.size), lengths)[permutation]
        turn = np.empty_like(bucket)
        turn[np.argsort(bucket, kind="stable")] = _ramps(self.first_turns(epoch) + before, lengths)
        self._recent = _Block(epoch, int(before.sum()), bucket, turn)
        return self._recent


def _ramps(starts: Int64s, lengths: Int64s) -> Int64s:
    """Return start, start + 1, … for each length, one after the other; [Σ lengths]."""
    offsets = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - offsets, lengths)
