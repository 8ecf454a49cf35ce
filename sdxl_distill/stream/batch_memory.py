"""The memory of batches: one block for all tensors of a batch, used again once nobody holds it.

Fresh memory costs a page fault for every 4 KiB, and memory that was just in use is still in the
processor's cache. A block comes back when the last tensor that looks into it is gone, so a caller
may keep a batch as long as he likes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import suppress
from math import prod
from typing import Final, NamedTuple

import numpy as np
import torch

from sdxl_distill.shards.safetensors_layout import byte_view

_LINE_BYTES: Final = 64  # of the processor's cache
_FILE_BLOCK_BYTES: Final = 512  # records begin at a multiple of this in a tar
_PAGE_BYTES: Final = 4096
_NO_MEMORY: Final = np.empty(0, np.uint8)
_GRANULARITY_BYTES: Final = 1 << 20  # blocks of nearly equal buckets serve each other


class Place(NamedTuple):
    """One tensor [B, …] of a batch in the block; a record's part has `row_bytes`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    row_bytes: int

    def row(self, row: int) -> slice:
        """Return where a record's part lies in the block."""
        return slice(self.offset + row * self.row_bytes, self.offset + (row + 1) * self.row_bytes)


class Layout(NamedTuple):
    """Where the tensors of a batch lie in its block."""

    places: tuple[Place, ...]
    num_bytes: int

    @classmethod
    def of(cls, tensors: Iterable[tuple[torch.dtype, tuple[int, ...], int]]) -> Layout:
        """Lay out contiguous tensors one after the other.

        A processor copies three to six times slower when the target lies less than a cache line
        after the source, modulo a page: each load then seems to wait for the store before it. So
        each tensor starts in the same cache line of 512 bytes as it does in the file.

        Args:
            tensors: dtype, shape [B, …], and offset of the tensor in a file's record.
        """
        places: list[Place] = []
        end = 0
        for dtype, shape, file_offset in tensors:
            phase = file_offset % _FILE_BLOCK_BYTES // _LINE_BYTES * _LINE_BYTES
            offset = end + (phase - end) % _FILE_BLOCK_BYTES
            strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
            row_bytes = dtype.itemsize * strides[0]
            places.append(Place(dtype, shape, strides, offset, row_bytes))
            end = offset + shape[0] * row_bytes
        return cls(tuple(places), _padded(end, _LINE_BYTES))


class Block(NamedTuple):
    """Memory of one batch."""

    content: memoryview
    tensors: tuple[torch.Tensor, ...]


class BatchMemory:
    """Gives blocks out and takes them back; safe to share between threads.

    Args:
        max_free: blocks that are kept while nobody uses them.
        pin_memory: whether blocks are page-locked; torch then keeps freed ones itself.
    """

    def __init__(self, *, max_free: int, pin_memory: bool) -> None:
        self._max_free = max_free
        self._pin_memory = pin_memory
        self._free: list[np.ndarray] = []

    def take(self, layout: Layout) -> Block:
        """Return a block of undefined content; it is free again when its tensors are gone."""
        if self._pin_memory:
            flat = torch.empty(layout.num_bytes, dtype=torch.uint8, pin_memory=True)
        else:
            flat = torch.from_numpy(self._lease(layout.num_bytes))
        typed = {place.dtype: flat.view(place.dtype) for place in layout.places}
        tensors = tuple(
            typed[place.dtype].as_strided(
                place.shape, place.strides, place.offset // place.dtype.itemsize
            )
            for place in layout.places
        )
        return Block(byte_view(flat), tensors)

    def _lease(self, num_bytes: int) -> np.ndarray:
        memory = _NO_MEMORY
        with suppress(IndexError):
            memory = self._free.pop()
        if memory.size < num_bytes:
            memory = _aligned(_padded(num_bytes, _GRANULARITY_BYTES))
        lease = memory[:]
        # Tensors keep the lease alive, the lease does not keep the memory from being used again.
        weakref.finalize(lease, self._give_back, memory).atexit = False
        return lease

    def _give_back(self, memory: np.ndarray) -> None:
        if len(self._free) < self._max_free:
            self._free.append(memory)


def _aligned(num_bytes: int) -> np.ndarray:
    """Return memory that begins at a page."""
    memory = np.empty(num_bytes + _PAGE_BYTES, np.uint8)
    start = -memory.ctypes.data % _PAGE_BYTES
    return memory[start : start + num_bytes]


def _padded(num_bytes: int, multiple: int) -> int:
    return num_bytes + -num_bytes % multiple
