"""Three stages that overlap: a reading thread, the calling thread, a writing thread.

The stages are joined by bounded channels, so that memory is bounded by their depth. An error in
one stage ends all three and surfaces in the caller as itself.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class _Stopped(BaseException):
    """Ends a stage because another one failed; never leaves this module."""


class _Channel(Generic[T]):
    """A bounded queue that can end, and lets no thread wait once its pipeline has failed."""

    def __init__(self, depth: int) -> None:
        self._waiting: deque[T] = deque()
        self._depth = depth
        self._ended = False
        self._failed = False
        self._changed = threading.Condition()

    def fill(self, values: Iterable[T]) -> None:
        """Put all values and end."""
        for value in values:
            self._put(value)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _put(self, value: T) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < self._depth or self._failed)
            if self._failed:
                raise _Stopped
            self._waiting.append(value)
            self._changed.notify_all()

    def fail(self) -> None:
        with self._changed:
            self._failed = True
            self._waiting.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended or self._failed)
                if self._failed:
                    raise _Stopped
                if not self._waiting:
                    return
                value = self._waiting.popleft()
                self._changed.notify_all()
            yield value


class _Guard:
    """Runs stages in any threads; the first error of one ends them all."""

    def __init__(self, channels: Sequence[_Channel[Any]], on_failure: Callable[[], None]) -> None:
        self.errors: list[BaseException] = []
        self._channels = channels
        self._on_failure = on_failure
        self._lock = threading.Lock()

    def run(self, stage: Callable[[], None]) -> None:
        try:
            stage()
        except _Stopped:
            return
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            with self._lock:
                self.errors.append(error)
                is_first = len(self.errors) == 1
            for channel in self._channels:
                channel.fail()
            if is_first:
                self._on_failure()


def run_pipeline(
    read: Callable[[], Iterable[T]],
    compute: Callable[[T], U],
    write: Callable[[Iterable[U]], None],
    *,
    on_failure: Callable[[], None],
    depth: int = 2,
) -> None:
    """Run `write(map(compute, read()))` with `compute` here and the others in threads.

    Args:
        read: the first stage, which yields what to compute; runs in the reading thread.
        compute: the second stage; runs in the calling thread, in the order of reading.
        write: the last stage, which takes the results in order; runs in the writing thread.
        on_failure: called once when a stage fails, to end what `read` may be waiting for.
        depth: the number of values that may wait for `compute`, and for `write`.

    Raises:
        BaseException: the first error of any stage, after all stages have ended.
    """
    # One bounded channel before each of the later stages; a failure closes both.
    readings, results = _Channel[T](depth), _Channel[U](depth)
    guard = _Guard((readings, results), on_failure)
    threads = [
        threading.Thread(target=guard.run, args=(stage,), name=name)
        for name, stage in (
            ("read", lambda: readings.fill(read())),
            ("write", lambda: write(results)),
        )
    ]

    def join_others() -> None:
        for thread in threads:
            thread.join()

    def compute_all() -> None:
        results.fill(map(compute, readings))
        join_others()  # within the guard: an interrupt that comes now must end them too

    # The model stays in the caller's thread, where signals arrive and its device is current.
    for thread in threads:
        thread.start()
    guard.run(compute_all)
    join_others()
    if guard.errors:
        raise guard.errors[0]
