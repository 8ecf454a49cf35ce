"""Reads records of one shard by index: preadv into the caller's memory, digests checked there.

Not mmap: a mapped file that is cut kills the process. Nothing is parsed on the way, and both the
read and the digest release the GIL, so threads scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch

from sdxl_distill.errors import CorruptError, DistillError
from sdxl_distill.shards.digest import bytes_digest, rest_digest
from sdxl_distill.shards.index import Int64, ShardIndex, UInt64
from sdxl_distill.shards.index_layout import ACTION
from sdxl_distill.shards.safetensors_layout import AnyTensor, TensorPlace, byte_view, dtype_of
from sdxl_distill.shards.tar import BLOCK_BYTES, padded, read_fully
from sdxl_distill.storage.random_access import RandomAccess

Buffer: TypeAlias = "AnyTensor | memoryview"


class ShardReader:
    """A tar with its index; safe to share between threads.

    Args:
        file: the tar.
        index: the tar's index.
        diagnose: a function that turns a CorruptError into the error to raise: the set knows
            whether the shard was replaced while it was read.
    """

    def __init__(
        self,
        file: RandomAccess,
        index: ShardIndex,
        diagnose: Callable[[CorruptError], DistillError],
    ) -> None:
        self.file = file
        self.index = index
        self._diagnose = diagnose

    def read_tensor_into(self, record: int, tensor_name: str, out: Buffer) -> None:
        """Copy one tensor of one record into `out` and check its digest there.

        Args:
            record: the number of the record in the shard.
            tensor_name: a tensor's name in the schema.
            out: a contiguous tensor, array or bytes on the CPU of exactly the tensor's size; a
                slice of a pinned batch, say. A tensor must have the stored dtype.

        Raises:
            CorruptError: when the bytes are not those of the index; `out` is then worthless.
            StorageError: when the shard was replaced or the operating system refuses.
            ValueError: when `out` has another size or dtype, or is not contiguous.
        """
        column = self.index.header.column(tensor_name)
        self.read_span(record, column, [_bytes_of(out, self.index.header.places[column], 1)])

    def read_span(self, record: int, first_column: int, buffers: Sequence[memoryview]) -> bool:
        """Copy tensors that lie side by side in one record, by one system call.

        Args:
            record: the number of the record in the shard.
            first_column: the first tensor's number in the header's places.
            buffers: one buffer of exactly the tensor's size for that tensor and each after it.

        Returns:
            True when all of it was in the page cache, so that there was no wait for a disk.

        Raises:
            CorruptError, StorageError: as `read_tensor_into`.
        """
        index, end_column = self.index, first_column + len(buffers)
        offset = int(index.offsets[record]) + index.header.places[first_column].offset
        try:
            was_cached = _read_side_by_side(self.file, buffers, offset, self._where(record))
        except CorruptError as error:
            raise self._diagnose(error) from error
        digests = index.digests[record, first_column:end_column].tolist()
        found = list(map(bytes_digest, buffers))
        if found != digests:
            damaged = [own != other for own, other in zip(found, digests, strict=True)]
            raise self._damaged(record, first_column + damaged.index(True))
        return was_cached

    def read_records(self, records: Sequence[int], tensor_name: str, out: Buffer) -> None:
        """Copy one tensor of B records into `out` [B, …]; otherwise as `read_tensor_into`."""
        column = self.index.header.column(tensor_name)
        place = self.index.header.places[column]
        buffer = _bytes_of(out, place, len(records))
        for row, record in enumerate(records):
            begin = row * place.num_bytes
            self.read_span(record, column, [buffer[begin : begin + place.num_bytes]])

    def read_record(self, record: int) -> dict[str, torch.Tensor]:
        """Return all tensors of one record, its header and its sidecar checked too.

        Raises:
            CorruptError, StorageError: as `read_tensor_into`.
        """
        header = self.index.header
        content = bytearray(header.record_bytes)
        view = memoryview(content)
        offset = int(self.index.offsets[record])
        self._fill(view, offset, record)
        self._check_rest(record, bytes(view[: len(header.content)]), self._sidecar(record))
        for column, place in enumerate(header.places):
            part = view[place.offset : place.offset + place.num_bytes]
            if bytes_digest(part) != self.index.digests[record, column]:
                raise self._damaged(record, column)
        return header.decode(content)

    def read_sidecar(self, record: int) -> bytes:
        """Return the JSON next to a record; empty where there is none.

        Raises:
            CorruptError, StorageError: as `read_tensor_into`.
        """
        content = self._sidecar(record)
        self._check_rest(record, self.index.header.content, content)
        return content

    def _sidecar(self, record: int) -> bytes:
        content = bytearray(int(self.index.sidecar_sizes[record]))
        if content:
            self._fill(memoryview(content), self.index.sidecar_offset(record), record)
        return bytes(content)

    def _fill(self, buffer: memoryview, offset: int, record: int) -> None:
        try:
            read_fully(self.file, buffer, offset, self._where(record))
        except CorruptError as error:
            raise self._diagnose(error) from error

    def _damaged(self, record: int, column: int) -> DistillError:
        place = self.index.header.places[column]
        offset = int(self.index.offsets[record]) + place.offset
        return self._diagnose(
            CorruptError(
                f"tensor {place.name} is damaged between bytes {offset} and "
                f"{offset + place.num_bytes}",
                expected="bytes with the digest of the index",
                where=self._where(record),
                action=ACTION,
            )
        )

    def _check_rest(self, record: int, header: bytes, sidecar: bytes) -> None:
        if (
            header != self.index.header.content
            or rest_digest(header, sidecar) != self.index.rest_digests[record]
        ):
            raise self._diagnose(
                CorruptError(
                    f"header or sidecar of the record at byte {self.index.offsets[record]} "
                    "is damaged",
                    expected="bytes with the digest of the index",
                    where=self._where(record),
                    action=ACTION,
                )
            )

    def _where(self, record: int) -> str:
        name = self.index.name
        return f"set {name.set_id}, shard {name.tar}, key {self.index.key(record)}"


class SpanReader:
    """Reads tensors that lie side by side in a shard's records, and keeps only their index rows.

    A join keeps thousands of these, at 8 bytes a record and tensor.

    Args:
        reader: the shard's reader.
        first_column: the first tensor's number in the header's places.
        num_columns: the number of tensors.
        reopen: a function that returns the shard's reader again, which says what is wrong.
    """

    def __init__(
        self,
        reader: ShardReader,
        first_column: int,
        num_columns: int,
        reopen: Callable[[], ShardReader],
    ) -> None:
        index = reader.index
        columns = slice(first_column, first_column + num_columns)
        places = index.header.places[columns]
        self._file = reader.file
        self._first_column = first_column
        self._num_bytes = sum(place.num_bytes for place in places)
        self._digests: UInt64 = np.array(index.digests[:, columns], np.uint64)
        self._offsets = _offsets_of(index, places[0].offset)
        self._reopen = reopen

    def read(self, record: int, buffers: Sequence[memoryview]) -> bool:
        """Copy the tensors of one record; otherwise as `ShardReader.read_span`."""
        try:
            was_cached = _read_side_by_side(self._file, buffers, int(self._offsets[record]), "")
        except CorruptError:
            return self._reopen().read_span(record, self._first_column, buffers)
        if list(map(bytes_digest, buffers)) != self._digests[record].tolist():
            return self._reopen().read_span(record, self._first_column, buffers)
        return was_cached

    def announce(self, record: int) -> None:
        """Let the disk start on what `read` will ask for."""
        self._file.prefetch(int(self._offsets[record]), self._num_bytes)


def _offsets_of(index: ShardIndex, offset: int) -> Sequence[int] | Int64:
    """Return where byte `offset` of each record lies; evenly spaced where there are no sidecars."""
    offsets = index.offsets
    if len(offsets) == 0 or index.sidecar_sizes.any():
        return offsets + offset
    stride = BLOCK_BYTES + padded(index.header.record_bytes)
    first = int(offsets[0]) + offset
    return range(first, first + stride * len(offsets), stride)


def _read_side_by_side(
    file: RandomAccess, buffers: Sequence[memoryview], offset: int, where: str
) -> bool:
    """Fill buffers from one stretch of a file; return True when all was in the page cache."""
    try:
        num_read = file.read_into(buffers, offset, wait=False)
    except OSError:
        num_read = 0
    if num_read == sum(map(len, buffers)):
        return True
    for buffer in buffers:
        read_fully(file, buffer, offset, where)
        offset += len(buffer)
    return False


def _bytes_of(out: Buffer, place: TensorPlace, num_records: int) -> memoryview:
    if isinstance(out, memoryview):
        buffer = out.cast("B")
    else:
        buffer = byte_view(out)
        if dtype_of(out) != place.dtype:
            raise ValueError(f"a buffer of {dtype_of(out)}, tensor {place.name} is {place.dtype}")
    if len(buffer) != num_records * place.num_bytes:
        raise ValueError(
            f"a buffer of {len(buffer)} bytes, {num_records} × {place.name} has "
            f"{num_records * place.num_bytes}"
        )
    return buffer
