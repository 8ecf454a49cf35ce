"""Work on many shards or files at once: results in order, and few of them held."""

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

    Unlike `ThreadPoolExecutor.map` it takes an argument only when a thread is soon free for it:
    neither the calls to come nor the results that nobody has asked for grow with their number.

    Args:
        function: called in the threads.
        arguments: taken in the caller's thread.
        num_threads: how many calls run at once.
        name: of the threads.

    Raises:
        BaseException: what a call raised; calls that have not begun are then given up.
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
