"""A progress bar on stderr, for commands that know how many items they work on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(
    description: str, unit: str, *, hidden: bool = False
) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with the number done and the number in all.

    The bar is also hidden if stderr is not a terminal.
    """
    with tqdm(desc=description, unit=unit, delay=1, disable=hidden or None) as bar:

        def show(num_done: int, num_all: int) -> None:
            bar.total = num_all
            bar.update(num_done - bar.n)

        yield show
