"""Work on many shards or files at once: results in order, only a few of them in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_WAITING_PER_THREAD: Final = 4


def ordered_map(
    function: Callable[[T], R], arguments: Iterable[T], num_threads: int, name: str
) -> Iterator[R]:
    """Yield `function(argument)` of each argument, in their order.

    Unlike `ThreadPoolExecutor.map` it takes an argument only when a thread will soon be free,
    so that neither pending calls nor unread results pile up.

    Args:
        function: the function, called in the threads.
        arguments: its arguments, taken in the caller's thread.
        num_threads: the number of calls that run at once.
        name: the prefix of the threads' names.

    Raises:
        BaseException: whatever a call raised; calls that have not begun are then cancelled.
    """
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix=name) as pool:
        try:
            for argument in arguments:
                waiting.append(pool.submit(function, argument))
                if len(waiting) > _WAITING_PER_THREAD * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
