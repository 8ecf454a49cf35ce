"""What may happen to a worker that slept: its set withdrawn, its staged files swept."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from sdxl_distill.errors import StorageError
from sdxl_distill.fsio import Directory, LostDirectoryError

T = TypeVar("T")


def require_in_place(directory: Directory) -> None:
    """Check that the set's name still stands for the folder that was opened.

    Raises:
        StorageError: when it was withdrawn or moved, so that all further work would be lost.
    """
    try:
        is_in_place = os.path.samestat(directory.path.stat(), os.fstat(directory.descriptor))
    except FileNotFoundError:
        is_in_place = False
    if not is_in_place:
        raise StorageError(
            "the set was withdrawn or moved while it was being built",
            where=str(directory.path),
            action="run again to go on with the set that is there now",
        )


def until_not_swept(directory: Directory, publish: Callable[[], T]) -> T:
    """Call `publish`, again when what it staged was swept: it costs less than to plan anew.

    Raises:
        StorageError: when the folder itself is gone, or whatever else `publish` raises.
    """
    while True:
        try:
            return publish()
        except LostDirectoryError:
            require_in_place(directory)
