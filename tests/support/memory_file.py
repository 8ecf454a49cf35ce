"""A file without a name, in memory: written as a staged file is, and read by position."""

from __future__ import annotations

import os
from collections.abc import Sequence


class MemoryFile:
    """Holds bytes as a `StagedFile` does, so that readers and writers of tars take it for one.

    Args:
        content: the bytes that it holds at first.
    """

    def __init__(self, content: bytes | bytearray = b"") -> None:
        self.file = os.fdopen(os.memfd_create("memory"), "w+b")
        self.file.write(content)
        self.file.flush()

    @property
    def descriptor(self) -> int:
        """To change the bytes under a reader."""
        return self.file.fileno()

    @property
    def num_bytes(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read_into(self, buffers: Sequence[memoryview], offset: int, *, wait: bool = True) -> int:
        return os.preadv(self.descriptor, buffers, offset, 0 if wait else os.RWF_NOWAIT)

    def prefetch(self, offset: int, num_bytes: int) -> None:
        pass

    def __del__(self) -> None:
        self.file.close()
