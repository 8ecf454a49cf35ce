"""Three stages that overlap: a reading thread, the calling thread, a writing thread.

The stages are joined by bounded channels, so that memory is bounded by their depth. An error in
one stage ends all three and surfaces in the caller as itself.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class _Stopped(BaseException):
    """Ends a stage because another one failed; never leaves this module."""


class _Channel(Generic[T]):
    """A bounded queue that can end, and lets nobody wait once its pipeline has failed."""

    def __init__(self, depth: int) -> None:
        self._waiting: deque[T] = deque()
        self._depth = depth
        self._ended = False
        self._failed = False
        self._changed = threading.Condition()

    def put(self, value: T) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < self._depth or self._failed)
            if self._failed:
                raise _Stopped
            self._waiting.append(value)
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
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
        read: yields what to compute; runs in the reading thread.
        compute: runs in the calling thread, in the order of reading.
        write: takes the results in the same order; runs in the writing thread.
        on_failure: called once when a stage fails, to end what `read` may be waiting for.
        depth: how many values may wait in front of `compute`, and in front of `write`.

    Raises:
        BaseException: the first error of any stage, after all stages have ended.
    """
    readings, results = _Channel[T](depth), _Channel[U](depth)
    errors: list[BaseException] = []
    lock = threading.Lock()

    def guarded(stage: Callable[[], None]) -> None:
        try:
            stage()
        except _Stopped:
            return
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            with lock:
                errors.append(error)
                is_first = len(errors) == 1
            readings.fail()
            results.fail()
            if is_first:
                on_failure()

    def read_all() -> None:
        for reading in read():
            readings.put(reading)
        readings.end()

    def compute_all() -> None:
        for reading in readings:
            results.put(compute(reading))
        results.end()
        join_others()  # within the guard: an interrupt that comes now must end them too

    def join_others() -> None:
        for thread in threads:
            thread.join()

    threads = [
        threading.Thread(target=guarded, args=(read_all,), name="read"),
        threading.Thread(target=guarded, args=(lambda: write(results),), name="write"),
    ]
    for thread in threads:
        thread.start()
    guarded(compute_all)
    join_others()
    if errors:
        raise errors[0]
