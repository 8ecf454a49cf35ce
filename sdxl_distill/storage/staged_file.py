"""A file in the making: it becomes a name of its folder when published, and vanishes otherwise."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import BinaryIO


class StagedFile:
    """A temporary file that becomes a name when published, and vanishes otherwise.

    What was flushed to it can be read back by position: it is a `RandomAccess`.

    Args:
        directory: the descriptor of the folder.
        temporary_name: the name that it has until it is published.

    Attributes:
        file: the open file, to be written.
    """

    def __init__(self, directory: int, temporary_name: str) -> None:
        self._directory = directory
        self.temporary_name = temporary_name
        descriptor = os.open(
            temporary_name,
            os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC,
            0o666,  # less what the umask takes
            dir_fd=directory,
        )
        self.file: BinaryIO = os.fdopen(descriptor, "w+b")

    @property
    def num_bytes(self) -> int:
        """The number of bytes flushed so far."""
        return os.fstat(self.file.fileno()).st_size

    def read_into(self, buffers: Sequence[memoryview], offset: int, *, wait: bool = True) -> int:
        """Read back what was flushed, as `RandomAccess.read_into`."""
        return os.preadv(self.file.fileno(), buffers, offset, 0 if wait else os.RWF_NOWAIT)

    def prefetch(self, offset: int, num_bytes: int) -> None:
        """Do nothing: what was just written is in memory."""

    def seal(self) -> None:
        """Flush every byte to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(self, *_exception: object) -> None:
        with suppress(OSError):
            self.file.close()
        with suppress(OSError):
            os.unlink(self.temporary_name, dir_fd=self._directory)
