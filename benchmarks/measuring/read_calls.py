"""The read calls of a join and its digests, nothing else: what no join that copies can beat."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from measuring.sets import SetFolders

from sdxl_distill.shards.digest import bytes_digest
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.shard_set import open_shard_set

_UNREAD = {"seed", "timestep", "resolution"}


class _Read(NamedTuple):
    descriptor: int
    offset: int
    sizes: tuple[int, ...]


class ReadCalls:
    """Reads what a join needs of all records into two batches: one is filled, one is in use.

    Memory beyond that costs: four batches were a third slower than two, and one a sixth faster.

    Args:
        folders: of the sets.
        num_teachers: whose predictions are read.
        batch_size: records of a batch.
        stack: closes the tars.
    """

    def __init__(
        self, folders: SetFolders, num_teachers: int, batch_size: int, stack: ExitStack
    ) -> None:
        seen: set[str] = set()
        reads = [_reads(path, seen, stack) for path in folders.sets(num_teachers)]
        records = list(zip(*reads, strict=True))
        room = -(-sum(sum(read.sizes) for read in records[0]) // mmap.PAGESIZE)
        row_bytes, num_rows = room * mmap.PAGESIZE, 2 * batch_size
        memory = memoryview(mmap.mmap(-1, num_rows * row_bytes))
        self._calls: list[tuple[int, list[memoryview], int]] = []
        for number, record in enumerate(records):
            begin = number % num_rows * row_bytes
            for descriptor, offset, sizes in record:
                views: list[memoryview] = []
                for size in sizes:
                    views.append(memory[begin : begin + size])
                    begin += size
                self._calls.append((descriptor, views, offset))

    def read(self) -> None:
        """Read everything once."""
        for descriptor, views, offset in self._calls:
            os.preadv(descriptor, views, offset)

    def read_and_digest(self) -> None:
        """Read everything once, and compute the digest of each tensor."""
        for descriptor, views, offset in self._calls:
            os.preadv(descriptor, views, offset)
            for view in views:
                bytes_digest(view)


def _reads(path: Path, seen: set[str], stack: ExitStack) -> list[_Read]:
    """Return one read for each record of a set."""
    reads: list[_Read] = []
    with open_shard_set(path) as shard_set:
        indices = [shard_set.index(name) for name in shard_set.manifest.names()]
    wanted = list(_wanted(indices[0].header, seen))
    for index in indices:
        descriptor = os.open(path / index.name.tar, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        places = [place for place in index.header.places if place.name in wanted]
        sizes = tuple(place.num_bytes for place in places)
        begins = (index.offsets + places[0].offset).tolist()
        reads += [_Read(descriptor, begin, sizes) for begin in begins]
    return reads


def _wanted(header: RecordHeader, seen: set[str]) -> Iterator[str]:
    """Yield what nobody before had, and the predictions; what follows from the id is not read."""
    for place in header.places:
        if place.name not in _UNREAD and place.name not in seen:
            seen.update({place.name} - {"teacher_pred"})
            yield place.name
