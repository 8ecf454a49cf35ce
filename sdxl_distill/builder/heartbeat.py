"""Signs of life: every worker keeps one file that shows all others whether it is alive.

The file names the process and counts the records it finished; a worker that hangs stops
counting. No clock is compared between machines: an observer measures, on its own monotonic
clock, for how long it saw no change. Rejected: a time stamp per claim, wrong under clock skew.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from sdxl_distill.builder.in_place import until_not_swept
from sdxl_distill.errors import CorruptError, StorageError
from sdxl_distill.runtime.process_identity import BEAT_SECONDS, EXPIRY_SECONDS, ProcessIdentity
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.regular_file import LostDirectoryError

HEARTBEAT_BYTES = 512
_NUM_LOOK_INTERVALS = 2


@dataclass(frozen=True)
class Timing:
    """How often workers show life, and how long others wait before they act."""

    heartbeat_seconds: float = BEAT_SECONDS
    """The interval between two heartbeats of one worker."""
    expiry_seconds: float = EXPIRY_SECONDS
    """A heartbeat that did not change for this long belongs to a dead or hung worker."""
    straggler_factor: float = 3.0
    """An idle worker takes over what is held longer than this many median shards."""
    poll_seconds: float = 1.0
    """The interval at which an idle worker looks at what the others still hold."""


@dataclass(frozen=True)
class Beat:
    """The content of one heartbeat file."""

    identity: ProcessIdentity
    num_records: int = 0
    """Records finished since the worker started: the number that must grow."""
    num_pending: int = 0
    """Those of them in shards that are not committed yet."""

    def to_bytes(self) -> bytes:
        """Encode as JSON of a fixed length, so that it can be rewritten in place."""
        return json.dumps(asdict(self)).encode("ascii").ljust(HEARTBEAT_BYTES)

    @classmethod
    def from_bytes(cls, content: bytes) -> Beat | None:
        """Decode; None when it is empty, torn or something else."""
        try:
            fields: dict[str, Any] = json.loads(content)
            identity = ProcessIdentity(**fields.pop("identity"))
            beat = cls(identity, **fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        numbers = (identity.pid, identity.start_ticks, beat.num_records, beat.num_pending)
        return beat if all(type(number) is int for number in numbers) else None


class Heartbeat:
    """This worker's own sign of life, rewritten by a thread until closed.

    Args:
        workers: the directory of heartbeats; its token is the worker's name.
        timing: the interval between two writes.
    """

    def __init__(self, workers: Directory, timing: Timing) -> None:
        self._workers = workers
        self._timing = timing
        self._lock = threading.Lock()
        self._beat = Beat(ProcessIdentity.current())
        self._closed = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def beat(self) -> Beat:
        """What the next heartbeat will say."""
        with self._lock:
            return self._beat

    def finish_records(self, num_records: int) -> None:
        """Count records that were finished in a shard still being built."""
        self._move(num_records, num_records)

    def settle_records(self, num_records: int) -> None:
        """Count the records of a shard as settled: it was committed or dropped."""
        self._move(0, -num_records)

    def show_progress(self) -> None:
        """Count one piece of work that is not a record, so as not to look hung."""
        self._move(1, 0)

    def close(self) -> None:
        """Stop beating and remove the file: a worker that left holds nothing."""
        self._closed.set()
        self._thread.join()
        self._workers.remove(self._workers.token)

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _move(self, num_records: int, num_pending: int) -> None:
        with self._lock:
            beat = self._beat
            self._beat = Beat(
                beat.identity, beat.num_records + num_records, beat.num_pending + num_pending
            )

    def _keep_beating(self) -> None:
        while not self._closed.wait(self._timing.heartbeat_seconds):
            # A disk that refuses a heartbeat refuses the shard too, and that error is shown;
            # here it only means that others may take over what this worker holds.
            with suppress(StorageError):
                self._write()

    def _write(self) -> None:
        """Rewrite the file in place: over NFS others see it at their next open.

        It is published whole at first, and again if a worker that took this one for dead, while
        it slept, removed it: an empty heartbeat would name no process.
        """
        token, content = self._workers.token, self.beat.to_bytes()
        if not self._workers.rewrite(token, content):
            until_not_swept(self._workers, partial(self._workers.publish_bytes, token, content))


class Observer:
    """Watches the heartbeats of other workers on its own monotonic clock.

    Args:
        workers: the directory of heartbeats.
        timing: the intervals, and the time for which an unchanged heartbeat counts as alive.
        clock: the time in seconds, which never goes back; replaced in tests.
    """

    def __init__(
        self, workers: Directory, timing: Timing, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._workers = workers
        self._timing = timing
        self._clock = clock
        self._identity = ProcessIdentity.current()
        self._seen: dict[str, _Sighting] = {}

    def is_dead(self, token: str) -> bool:
        """Look at one worker. True: it left, was killed, or finished nothing for too long.

        A worker has a heartbeat before it has anything else, and removes it last. One look
        counts for at most two intervals: an observer that slept must not take a silence that it
        did not watch for the others' death.
        """
        try:
            content = self._workers.read(token, HEARTBEAT_BYTES)
        except (FileNotFoundError, LostDirectoryError):
            return True
        except CorruptError:
            content = b""
        beat = Beat.from_bytes(content)
        if beat is not None and beat.identity.is_gone(self._identity):
            return True
        now = self._clock()
        seen = self._seen.get(token)
        if seen is None or seen.content != content:
            self._seen[token] = _Sighting(content, now, 0.0)
            return False
        longest = _NUM_LOOK_INTERVALS * self._timing.heartbeat_seconds
        seen.unchanged_seconds += min(now - seen.looked_at, longest)
        seen.looked_at = now
        return seen.unchanged_seconds >= self._timing.expiry_seconds

    def num_pending(self) -> int:
        """Return how many records the other living workers finished in uncommitted shards."""
        num_pending = 0
        tokens = until_not_swept(self._workers, self._workers.names)
        for token in tokens - {self._workers.token}:
            with suppress(FileNotFoundError, LostDirectoryError, CorruptError):
                beat = Beat.from_bytes(self._workers.read(token, HEARTBEAT_BYTES))
                if beat is not None and not beat.identity.is_gone(self._identity):
                    num_pending += beat.num_pending
        return num_pending


@dataclass
class _Sighting:
    content: bytes
    looked_at: float
    unchanged_seconds: float
