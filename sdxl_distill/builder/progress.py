"""The progress of a set, over the workers of all launches: committed shards plus heartbeats."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tqdm import tqdm

from sdxl_distill.builder.work_queue import INDEX_SUFFIX, WorkQueue
from sdxl_distill.errors import StorageError
from sdxl_distill.storage.fsio import Directory

_TERMINAL_SECONDS = 1.0
_LOG_SECONDS = 30.0
_MAX_SHARE_OF_TIME = 0.05


@contextmanager
def shown_progress(
    directory: Directory, queue: WorkQueue, num_records: Mapping[str, int]
) -> Iterator[None]:
    """Show rate, percent and time left on standard error while the block runs.

    Args:
        directory: the set's folder.
        queue: the claims on the set; its heartbeats count records of uncommitted shards.
        num_records: the records of each shard, by name without suffix; their sum is the total.
    """
    interval = _TERMINAL_SECONDS if sys.stderr.isatty() else _LOG_SECONDS
    ended = threading.Event()
    total = sum(num_records.values())
    with tqdm(
        total=total,
        initial=_count(directory, queue, num_records),
        desc=directory.name,
        unit="rec",
        mininterval=0,
    ) as bar:

        def look() -> None:
            bar.update(max(0, min(_count(directory, queue, num_records), total) - bar.n))

        def watch() -> None:
            pause = interval
            while not ended.wait(pause):
                started = time.monotonic()
                try:
                    look()
                except StorageError:
                    return  # the build itself meets the same fault and reports it
                # Listing a huge set over a network must not become the main load on it.
                pause = max(interval, (time.monotonic() - started) / _MAX_SHARE_OF_TIME)

        watcher = threading.Thread(target=watch, name="progress", daemon=True)
        watcher.start()
        try:
            yield
            look()
        finally:
            ended.set()
            watcher.join()


def _count(directory: Directory, queue: WorkQueue, num_records: Mapping[str, int]) -> int:
    stems = {
        name.removesuffix(INDEX_SUFFIX) for name in directory.names() if name.endswith(INDEX_SUFFIX)
    }
    committed = sum(count for stem, count in num_records.items() if stem in stems)
    return committed + queue.heartbeat.beat.num_pending + queue.observer.num_pending()
