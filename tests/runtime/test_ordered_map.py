"""Results in order, arguments taken only when a thread is soon free, errors at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from support.patience import PATIENCE_SECONDS

from sdxl_distill.runtime.ordered_map import ordered_map


def _counted(taken: list[int], count: int) -> Iterator[int]:
    for number in range(count):
        taken.append(number)
        yield number


@pytest.mark.parametrize("num_threads", [1, 3])
def test_results_come_in_the_order_of_the_arguments(num_threads: int) -> None:
    assert list(ordered_map(lambda n: n * n, range(50), num_threads, "test")) == [
        n * n for n in range(50)
    ]


def test_arguments_are_taken_only_when_a_thread_is_soon_free() -> None:
    taken: list[int] = []
    results = ordered_map(lambda n: n, _counted(taken, 1000), 2, "test")
    next(results)
    assert len(taken) == 9
    next(results)
    assert len(taken) == 10
    results.close()


def test_an_error_ends_it_and_calls_that_have_not_begun_are_given_up() -> None:
    called: list[int] = []
    release = threading.Event()

    def call(number: int) -> int:
        called.append(number)
        if number == 0:
            raise KeyError(number)
        release.wait(PATIENCE_SECONDS)
        return number

    results = ordered_map(call, range(100), 1, "test")
    timer = threading.Timer(0.05, release.set)
    timer.start()
    with pytest.raises(KeyError):
        next(results)
    timer.join()
    assert len(called) <= 2
