"""Bytes that are read by position, wherever they lie: what readers of shards know of a file.

A tar on a disk is one, ranges of an object in a store can be another. Readers never see a
descriptor, so that they work on both.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Protocol


class RandomAccess(Protocol):
    """A file of known size; safe to share between threads."""

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        ...

    def read_into(self, buffers: Sequence[memoryview], offset: int, *, wait: bool = True) -> int:
        """Fill buffers from `offset` on by one request; return how many bytes came.

        Args:
            buffers: writable bytes, filled one after the other; of any sizes.
            offset: the position of the first byte in the file.
            wait: False returns only bytes that are in memory already, possibly none.

        Raises:
            OSError: when the request is refused.
        """
        ...

    def prefetch(self, offset: int, num_bytes: int) -> None:
        """Begin to fetch what `read_into` will ask for."""
        ...


class Descriptor:
    """A descriptor of a local file that is read by position; closed with its last reference.

    So a thread that still reads, while another one makes room, never meets a descriptor that
    stands for another file.

    Args:
        number: the descriptor, which now belongs to this object.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self.close = weakref.finalize(self, os.close, number)

    @property
    def num_bytes(self) -> int:
        """The size of the file at this moment."""
        return os.fstat(self._number).st_size

    def read_into(self, buffers: Sequence[memoryview], offset: int, *, wait: bool = True) -> int:
        """Fill buffers as `RandomAccess.read_into`, by one call of preadv."""
        return os.preadv(self._number, buffers, offset, 0 if wait else os.RWF_NOWAIT)

    def prefetch(self, offset: int, num_bytes: int) -> None:
        """Have the kernel begin to read from the disk."""
        os.posix_fadvise(self._number, offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def __enter__(self) -> Descriptor:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
