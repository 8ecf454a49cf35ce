"""The stages overlap, keep their order, bound their memory and fail as one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator

import pytest
from support.patience import PATIENCE_SECONDS

from sdxl_distill.builder.pipeline import run_pipeline


class Recorder:
    """A writer that keeps what it gets, and the failure callback."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.failures = 0

    def write(self, results: Iterable[int]) -> None:
        self.written.extend(results)

    def fail(self) -> None:
        self.failures += 1


def test_results_are_written_in_the_order_of_reading() -> None:
    recorder = Recorder()
    run_pipeline(
        lambda: range(100), lambda value: value * 2, recorder.write, on_failure=recorder.fail
    )
    assert recorder.written == [2 * value for value in range(100)]
    assert recorder.failures == 0


def test_stages_overlap() -> None:
    """One is written while the next is computed and the one after it is read, each time."""
    count = 10
    meeting = threading.Barrier(3, timeout=PATIENCE_SECONDS)

    def read() -> Iterator[int]:
        for value in range(count + 2):
            if value >= 2:
                meeting.wait()
            yield value

    def compute(value: int) -> int:
        if 1 <= value <= count:
            meeting.wait()
        return value

    def write(results: Iterable[int]) -> None:
        for value in results:
            if value < count:
                meeting.wait()

    run_pipeline(read, compute, write, on_failure=meeting.abort)


def test_reading_runs_ahead_by_no_more_than_the_depth() -> None:
    num_read = num_computed = most_ahead = 0

    def read() -> Iterator[int]:
        nonlocal num_read, most_ahead
        for value in range(50):
            num_read += 1
            most_ahead = max(most_ahead, num_read - num_computed)
            yield value

    def compute(value: int) -> int:
        nonlocal num_computed
        time.sleep(0.002)
        num_computed += 1
        return value

    recorder = Recorder()
    run_pipeline(read, compute, recorder.write, on_failure=recorder.fail, depth=3)
    assert most_ahead <= 3 + 2


@pytest.mark.parametrize("stage", ["read", "compute", "write"])
def test_an_error_in_any_stage_ends_all_and_surfaces_as_itself(stage: str) -> None:
    error = KeyError(stage)

    def fail_in(name: str, value: int) -> int:
        if name == stage and value == 7:
            raise error
        return value

    def read() -> Iterator[int]:
        for value in range(1_000_000):
            yield fail_in("read", value)

    def write(results: Iterable[int]) -> None:
        for result in results:
            fail_in("write", result)

    recorder = Recorder()
    with pytest.raises(KeyError) as caught:
        run_pipeline(read, lambda value: fail_in("compute", value), write, on_failure=recorder.fail)
    assert caught.value is error
    assert recorder.failures == 1
    assert not {"read", "write"} & {thread.name for thread in threading.enumerate()}


def test_a_reader_that_waits_is_woken_by_a_failure() -> None:
    woken = threading.Event()

    def read() -> Iterator[int]:
        yield 0
        woken.wait(PATIENCE_SECONDS)

    def compute(_: int) -> int:
        raise ValueError("stop")

    started = time.monotonic()
    with pytest.raises(ValueError, match="stop"):
        run_pipeline(read, compute, Recorder().write, on_failure=woken.set)
    assert time.monotonic() - started < PATIENCE_SECONDS


def test_an_interrupt_while_the_writer_finishes_ends_the_writer_too() -> None:
    def write(results: Iterable[int]) -> None:
        for _ in results:
            while not woken.is_set():
                time.sleep(0.01)

    woken = threading.Event()

    def compute(value: int) -> int:
        if value == 1:
            raise KeyboardInterrupt
        return value

    with pytest.raises(KeyboardInterrupt):
        run_pipeline(lambda: range(2), compute, write, on_failure=woken.set)
