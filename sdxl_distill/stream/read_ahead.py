"""Reading ahead: a bounded number of batches in flight, filled by threads, handed out in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from threading import Lock

import numpy as np

from sdxl_distill.order.stream_order import PlannedBatch
from sdxl_distill.stream.batch import JoinedBatch
from sdxl_distill.stream.join import Join, UnfilledBatch


class ReadAhead:
    """Threads that fill batches; they end with `close`, or when nothing refers to this any more.

    A caller that asks for an unfinished batch fills the rows that no thread has begun.

    Args:
        join: the join that fills rows.
        num_threads: number of reading threads; 0 leaves all reading to the caller.
        num_batches: number of batches in flight beyond the one that is handed out; bounds the
            memory.
    """

    def __init__(self, join: Join, *, num_threads: int, num_batches: int) -> None:
        self._join = join
        self._num_pieces = num_threads + 1
        self._num_batches = num_batches if num_threads else 0
        self._pool = (
            ThreadPoolExecutor(num_threads, thread_name_prefix="stream") if num_threads else None
        )

    def batches(self, reads: Iterator[PlannedBatch]) -> Iterator[JoinedBatch]:
        """Yield the batch of each read, in order; reading begins with the first `next`.

        Raises:
            Exception: what a thread raised, at the batch where it did; the iterator then ends.
        """
        in_flight: deque[_BatchInFlight] = deque()
        try:
            while True:
                room = self._num_batches + 1 - len(in_flight)
                in_flight.extend(self._start(read) for read in islice(reads, room))
                if not in_flight:
                    return
                in_flight[0].wait()
                # Not bound to a name: that would keep its memory alive until the next batch.
                yield in_flight.popleft().batch()
        finally:
            for unfinished in in_flight:
                unfinished.cancel()

    def close(self) -> None:
        """Drop what has not begun and wait for the threads; iterators are unusable afterwards."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, read: PlannedBatch) -> _BatchInFlight:
        # Sorted by shard, so that mostly one thread reads a shard and opens it once.
        rows = np.lexsort((read.draws, read.shards)).tolist()
        rows_per_piece = -(-len(rows) // self._num_pieces)
        batch = _BatchInFlight(self._join, read)
        for start in range(0, len(rows), rows_per_piece):
            batch.add_piece(rows[start : start + rows_per_piece], self._pool)
        return batch


class _BatchInFlight:
    """A batch that is filled piece by piece; it takes memory only when the first one begins."""

    def __init__(self, join: Join, read: PlannedBatch) -> None:
        self._join = join
        self._read = read
        self._lock = Lock()
        self._unfilled: UnfilledBatch | None = None
        self._keys = [""] * len(read.positions)
        self._pieces: list[tuple[list[int], Future[None]]] = []

    def add_piece(self, rows: list[int], pool: ThreadPoolExecutor | None) -> None:
        """Let the next free thread fill some rows."""
        future = Future[None]() if pool is None else pool.submit(self._fill, rows)
        self._pieces.append((rows, future))

    def wait(self) -> None:
        """Fill what no thread has begun, and wait for the rest."""
        for rows, future in reversed(self._pieces):
            if future.cancel():
                self._fill(rows)
        for _, future in self._pieces:
            if not future.cancelled():
                future.result()

    def batch(self) -> JoinedBatch:
        """Return the batch, once it is filled."""
        assert self._unfilled is not None
        return replace(self._unfilled.batch, keys=tuple(self._keys))

    def cancel(self) -> None:
        """Drop what has not begun."""
        for _, future in self._pieces:
            future.cancel()

    def _fill(self, rows: Sequence[int]) -> None:
        with self._lock:
            if self._unfilled is None:
                self._unfilled = self._join.allocate(self._read)
        for row, key in zip(rows, self._join.fill(self._unfilled, rows), strict=True):
            self._keys[row] = key
