"""What readers need from a set's folder, and how they read one on a local disk.

Builders hold a folder by handle (`fsio.Directory`). Readers look it up by name each time, so
that they notice when another set has taken the place of the one they opened.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from sdxl_distill.storage.open_file import OPEN_FILES, OpenFile
from sdxl_distill.storage.random_access import RandomAccess
from sdxl_distill.storage.regular_file import open_regular, read_bytes

T = TypeVar("T")


class Folder(Protocol):
    """A folder whose files are read: a local one, or a prefix of an object store."""

    def where(self, name: str = "") -> str:
        """Return where the folder or a file in it lies, for messages."""
        ...

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return the content of a file of at most `max_bytes`, checked before memory is taken.

        Raises:
            FileNotFoundError: when it does not exist.
            CorruptError: when it is larger, or not a regular file.
            StorageError: when the storage refuses.
        """
        ...

    def open(self, name: str, where: str | None = None) -> RandomAccess:
        """Return a file to be read by position; raises as `read`.

        Args:
            name: the name of the file.
            where: the name of the file in later messages; None means `where(name)`.
        """
        ...


class FolderByPath:
    """A local folder, found by its path each time that it is read.

    Args:
        path: the folder's path; a string, since joining `Path`s takes longer than opening files.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def where(self, name: str = "") -> str:
        """Return the path of the folder, or of a file in it."""
        return f"{self._path}/{name}" if name else self._path

    def read(self, name: str, max_bytes: int) -> bytes:
        """Read a file as `Folder.read`."""
        return self._again_after_listing(lambda: read_bytes(self.where(name), max_bytes))

    def open(self, name: str, where: str | None = None) -> OpenFile:
        """Open a file that shares the descriptors of this process with all others."""
        path = self.where(name)
        open_path = partial(open_regular, path)
        return OpenFile(partial(self._again_after_listing, open_path), where or path)

    def _again_after_listing(self, read: Callable[[], T]) -> T:
        """Return `read()`; retry after a listing, since NFS may remember that a file was absent."""
        with suppress(FileNotFoundError):
            return OPEN_FILES.with_room(read)
        with suppress(OSError):
            sorted(Path(self._path).iterdir())
        return OPEN_FILES.with_room(read)
