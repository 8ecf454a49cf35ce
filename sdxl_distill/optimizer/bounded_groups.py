"""Cutting a sequence of tensors into runs of bounded size: as much as is worked on at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def bounded_groups(
    values: Iterable[T], num_elements: Callable[[T], int], max_elements: int
) -> Iterator[list[T]]:
    """Yield consecutive values in lists, each as long as `max_elements` allows.

    Args:
        values: in order.
        num_elements: of one value.
        max_elements: of all in one list; a larger value makes a list of its own.
    """
    run: list[T] = []
    total = 0
    for value in values:
        size = num_elements(value)
        if run and total + size > max_elements:
            yield run
            run, total = [], 0
        run.append(value)
        total += size
    if run:
        yield run
