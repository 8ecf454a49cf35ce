"""What may happen to a worker that slept: its set withdrawn, its staged files swept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from sdxl_distill.errors import StorageError
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.regular_file import LostDirectoryError

T = TypeVar("T")

_NUM_ATTEMPTS = 100


def require_in_place(directory: Directory) -> None:
    """Check that the set's name still stands for the folder that was opened.

    Raises:
        StorageError: when it was withdrawn or moved, so that all further work would be lost.
    """
    if not directory.is_in_place():
        raise StorageError(
            "the set was withdrawn or moved while it was being built",
            where=directory.where(),
            action="run again to continue with the set that is in its place now",
        )


def until_not_swept(directory: Directory, work: Callable[[], T]) -> T:
    """Call `work`; retry if its staged file was swept: cheaper than planning again.

    A folder of claims or heartbeats that was removed is made again: it guards no data.

    Args:
        directory: the folder that `work` writes to.
        work: the function to call.

    Raises:
        StorageError: when the set itself is gone, or the staged file was swept at every attempt;
            also whatever `work` raises.
    """
    for _ in range(_NUM_ATTEMPTS):
        with suppress(LostDirectoryError):
            return work()
        require_in_place(_outermost(directory))
        with suppress(LostDirectoryError):  # removed again meanwhile: the next attempt sees it
            directory.make_again()
    return work()


def _outermost(directory: Directory) -> Directory:
    while directory.parent is not None:
        directory = directory.parent
    return directory
