"""Reading ahead: a bounded number of batches in flight, filled by threads, handed out in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from sdxl_distill.stream.batch import JoinedBatch
from sdxl_distill.stream.join import Join
from sdxl_distill.stream.schedule import Batch


class ReadAhead:
    """Threads that fill batches; they end with `close`, or when nothing refers to this any more.

    Args:
        join: fills rows.
        num_threads: that read; the rows of each batch are shared out over them.
        num_batches: in flight beyond the one that is handed out; bounds the memory.
    """

    def __init__(self, join: Join, *, num_threads: int, num_batches: int) -> None:
        self._join = join
        self._num_threads = num_threads
        self._num_batches = num_batches
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="stream")

    def batches(self, reads: Iterator[Batch]) -> Iterator[JoinedBatch]:
        """Yield the batch of each read, in order; reading begins with the first `next`.

        Raises:
            Exception: what a thread raised, at the batch where it did; the iterator then ends.
        """
        in_flight: deque[_UnfinishedBatch] = deque()
        try:
            while True:
                room = self._num_batches + 1 - len(in_flight)
                in_flight.extend(self._start(read) for read in islice(reads, room))
                if not in_flight:
                    return
                batch = in_flight[0].result()
                in_flight.popleft()
                yield batch
        finally:
            for unfinished in in_flight:
                unfinished.cancel()

    def close(self) -> None:
        """Drop what has not begun and wait for the threads; iterators are of no use then."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, read: Batch) -> _UnfinishedBatch:
        batch = self._join.allocate(read)
        # A thread that gets the records of one shard together opens it once.
        order = np.lexsort((read.draws, read.shards)).tolist()
        num_rows = -(-len(order) // self._num_threads)
        pieces = [order[start : start + num_rows] for start in range(0, len(order), num_rows)]
        keys = [self._pool.submit(self._join.fill, batch, read, rows) for rows in pieces]
        return _UnfinishedBatch(batch, pieces, keys)


@dataclass(frozen=True)
class _UnfinishedBatch:
    batch: JoinedBatch
    pieces: list[list[int]]
    keys: list[Future[list[str]]]

    def result(self) -> JoinedBatch:
        """Wait for all rows."""
        keys = dict[int, str]()
        for rows, future in zip(self.pieces, self.keys, strict=True):
            keys.update(zip(rows, future.result(), strict=True))
        return replace(self.batch, keys=tuple(keys[row] for row in range(len(self.batch))))

    def cancel(self) -> None:
        for future in self.keys:
            future.cancel()
