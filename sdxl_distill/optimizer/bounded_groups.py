"""Bounded groups: a sequence of tensors cut into as much as is worked on at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def bounded_groups(
    values: Iterable[T], num_elements: Callable[[T], int], max_elements: int
) -> Iterator[list[T]]:
    """Yield consecutive values in groups, each as large as `max_elements` allows.

    Args:
        values: the values, in order.
        num_elements: function that returns the number of elements of one value.
        max_elements: most elements in one group; a larger value makes a group of its own.
    """
    group: list[T] = []
    total = 0
    for value in values:
        size = num_elements(value)
        if group and total + size > max_elements:
            yield group
            group, total = [], 0
        group.append(value)
        total += size
    if group:
        yield group
