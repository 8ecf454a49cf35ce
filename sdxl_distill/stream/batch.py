"""A batch of joined records: what one rank's student sees in one optimizer step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from sdxl_distill.core.bucket import Bucket
from sdxl_distill.runtime.device import CopyStream
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


class BatchLayout(NamedTuple):
    """Where the tensors of a batch lie in its block."""

    places: tuple[Place, ...]
    num_bytes: int

    @classmethod
    def of(cls, tensors: Iterable[tuple[torch.dtype, tuple[int, ...], int]]) -> BatchLayout:
        """Lay out contiguous tensors one after the other.

        A processor copies three to six times slower when the target lies less than a cache line
        after the source, modulo a page: each load then seems to wait for the store before it. So
        each tensor starts at the same cache line, modulo 512 bytes, as it does in the file.

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
    """Lends blocks and takes them back; safe to share between threads.

    Args:
        max_free: largest number of unused blocks that are kept.
        pin_memory: true for page-locked blocks, of which torch itself keeps the freed ones.
    """

    def __init__(self, *, max_free: int, pin_memory: bool) -> None:
        self._max_free = max_free
        self._pin_memory = pin_memory
        self._free: list[np.ndarray] = []

    def take(self, layout: BatchLayout) -> Block:
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
        # The tensors keep the lease alive; when the last is gone, the memory is free again.
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


@dataclass(frozen=True)
class JoinedBatch:
    """The records of all sets for B keys of one bucket.

    Attributes:
        epoch: pass over the images that this step belongs to.
        step: position of the step in its epoch.
        bucket: the common resolution in pixels.
        keys: `{image_id}_{W}x{H}` of each record.
        draws: number of each record's draw, that is, its (timestep, noise) pair.
        latents: scaled VAE latents, float16 [B, C, H/8, W/8].
        noise: standard normal, float16 [B, C, H/8, W/8].
        timesteps: int64 [B].
        predictions: one tensor per teacher, in the order of the joined sets,
            [B, C, H/8, W/8] in its cache dtype.
        encoder_hidden_states: text embeddings, float16 [B, T, D].
        pooled_embeds: float16 [B, P].
        time_ids: micro-conditioning, int32 [B, 6].
    """

    epoch: int
    step: int
    bucket: Bucket
    keys: tuple[str, ...]
    draws: tuple[int, ...]
    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    predictions: tuple[torch.Tensor, ...]
    encoder_hidden_states: torch.Tensor
    pooled_embeds: torch.Tensor
    time_ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> JoinedBatch:
        """Copy to a device; from pinned memory without waiting for the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def uploaded(self, copies: CopyStream) -> JoinedBatch:
        """Copy to a device while it computes; what it computes next waits for the copy."""
        with copies.copying() as copy:
            return self._map(copy)

    def micro_batches(self, max_records: int) -> Iterator[JoinedBatch]:
        """Cut into consecutive pieces of at most `max_records`, as views."""
        for start in range(0, len(self), max_records):
            rows = slice(start, start + max_records)
            piece = self._map(lambda tensor, rows=rows: tensor[rows])
            yield replace(piece, keys=self.keys[rows], draws=self.draws[rows])

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> JoinedBatch:
        changed: dict[str, Any] = {"predictions": tuple(map(function, self.predictions))}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                changed[field.name] = function(value)
        return replace(self, **changed)
