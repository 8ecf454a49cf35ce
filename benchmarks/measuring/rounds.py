"""Alternating rounds: whatever disturbs the machine disturbs all contenders alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Sample:
    """The values of one contender, one for each round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest one."""
        return min(self.values), max(self.values)

    def over(self, other: Sample) -> Sample:
        """Return this divided by another, round by round: both saw the same disturbance."""
        pairs = zip(self.values, other.values, strict=True)
        return Sample(tuple(own / against for own, against in pairs))

    def scaled(self, factor: float) -> Sample:
        """Return all values times a factor."""
        return Sample(tuple(value * factor for value in self.values))

    def rate_of(self, amount: float) -> Sample:
        """Return an amount divided by each value: seconds become a rate."""
        return Sample(tuple(amount / value for value in self.values))


def alternate(contenders: Mapping[str, Callable[[], float]], num_rounds: int) -> dict[str, Sample]:
    """Let contenders run in turn, round after round, after one round that does not count.

    Args:
        contenders: name → a run that returns what it measured, mostly seconds.
        num_rounds: that count; each begins with another contender.
    """
    values: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for number in range(num_rounds + 1):
        for name in order:
            value = contenders[name]()
            if number:
                values[name].append(value)
        order = [*order[1:], order[0]]
    return {name: Sample(tuple(own)) for name, own in values.items()}


def seconds(run: Callable[[], object]) -> Callable[[], float]:
    """Return a contender that tells how long `run` takes."""

    def timed() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return timed


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Give a function that tells the seconds since the block began."""
    start = time.perf_counter()
    yield lambda: time.perf_counter() - start


@contextmanager
def timed_calls(owner: type, name: str) -> Iterator[Callable[[], float]]:
    """Give a function that tells the seconds spent in a method since the block began."""
    method, spent = getattr(owner, name), [0.0]

    @wraps(method)
    def timed(*arguments: Any, **options: Any) -> Any:
        with stopwatch() as elapsed:
            result = method(*arguments, **options)
            spent[0] += elapsed()
        return result

    with mock.patch.object(owner, name, timed):
        yield lambda: spent[0]
