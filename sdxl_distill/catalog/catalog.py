"""The catalog: segments 0…n of a folder, read and checked as one table of images.

Each segment names its predecessor's sha256, so n alone identifies a catalog. Rows stay in
columns until a shard asks for its own: a million images are 300 MB as columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sdxl_distill.catalog.row_check import require_legal_rows, row_places
from sdxl_distill.catalog.segment import (
    RESTORE_CATALOG,
    SCHEMA,
    CatalogRow,
    Segment,
    decode_segment,
    segment_name,
    segment_number,
    to_rows,
)
from sdxl_distill.core.bucket import Bucket
from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.limits import MAX_SEGMENT_BYTES
from sdxl_distill.storage.fsio import Directory

CATALOG_FOLDER: Final = "catalog"
"""Where a latents set keeps its segments."""

_ROWS_AT_ONCE: Final = 4096


class CatalogShard(NamedTuple):
    """The rows of one shard: `num_rows` of the catalog from `first_row`, sorted by image id."""

    bucket: Bucket
    number: int
    first_row: int
    num_rows: int


class KnownFile(NamedTuple):
    """What a scan need not find out again about a file that did not change."""

    image_id: str
    num_bytes: int
    mtime_ns: int
    width: int
    height: int


_KNOWN_NUMBERS: Final = ("bytes", "mtime_ns", "width", "height")


class CataloguedImage(NamedTuple):
    """Identity, source and caption digest of an image that has a shard."""

    image_id: str
    source: str
    captions_sha256: str


class KnownFiles:
    """What is known of each source, in 40 bytes a row and without an object for each.

    Args:
        table: the rows of a catalog; of two rows of one source the later counts.
    """

    def __init__(self, table: pa.Table) -> None:
        self._sources, self._ids = table["source"], table["image_id"]
        self._numbers = [table[name].to_numpy() for name in _KNOWN_NUMBERS]
        sources = (source for (source,) in _cells(table, ("source",)))
        hashes = np.fromiter(map(hash, sources), np.int64, table.num_rows)
        self._rows = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._rows]

    def find(self, source: str) -> KnownFile | None:
        """Return what is known of a source; None for one that no row has."""
        digest = np.int64(hash(source))
        end = int(np.searchsorted(self._hashes, digest, "right"))
        while end and self._hashes[end - 1] == digest:
            row = int(self._rows[end - 1])
            if self._sources[row].as_py() == source:
                numbers = (int(column[row]) for column in self._numbers)
                return KnownFile(self._ids[row].as_py(), *numbers)
            end -= 1
        return None


@dataclass(frozen=True, eq=False)
class Catalog:
    """Segments 0…n; none at all is the empty catalog with n = -1."""

    segments: tuple[Segment, ...] = ()

    @classmethod
    def load(cls, directory: Directory, n: int | None = None) -> Catalog:
        """Read segments 0…n, or all there are.

        Raises:
            CorruptError: when one is missing or damaged.
            IncompatibleError: when one does not follow its predecessor.
        """
        if n is None:
            numbers = map(segment_number, directory.names())
            n = max((number for number in numbers if number is not None), default=-1)
        segments: list[Segment] = []
        for number in range(n + 1):
            where = str(directory.path / segment_name(number))
            segment = _read_segment(directory, number)
            _require_chain(segment, segments, number, where)
            require_legal_rows(segment.table, where)
            segments.append(segment)
        return cls(tuple(segments))

    @property
    def n(self) -> int:
        """The catalog's version: number of its last segment, -1 when there is none."""
        return len(self.segments) - 1

    @property
    def sha256(self) -> str:
        """SHA-256 of the last segment's bytes, which vouches for all before it; "" when empty."""
        return self.segments[-1].sha256 if self.segments else ""

    @property
    def scan_started_ns(self) -> int:
        """When the scan behind the last segment began, nanoseconds since 1970; 0 when empty."""
        return self.segments[-1].header.scan_started_ns if self.segments else 0

    @cached_property
    def table(self) -> pa.Table:
        """All rows: segment after segment, each sorted by bucket, shard and image id."""
        return pa.concat_tables([SCHEMA.empty_table(), *(s.table for s in self.segments)])

    @property
    def num_images(self) -> int:
        """How many images have a shard."""
        return self.table.num_rows

    @cached_property
    def shards(self) -> tuple[CatalogShard, ...]:
        """Every shard, in the order of the rows."""
        places = row_places(self.table)
        first_rows = np.flatnonzero(np.any(places[1:] != places[:-1], axis=1)) + 1
        edges = [0, *first_rows.tolist(), len(places)] if len(places) else []
        return tuple(
            CatalogShard(
                Bucket(int(places[start][0]), int(places[start][1])),
                int(places[start][2]),
                start,
                stop - start,
            )
            for start, stop in pairwise(edges)
        )

    def rows(self, shard: CatalogShard) -> list[CatalogRow]:
        """Return the images of one shard, sorted by image id."""
        return to_rows(self.table.slice(shard.first_row, shard.num_rows))

    @cached_property
    def ids(self) -> npt.NDArray[np.uint8]:
        """Image ids of all rows, uint8 [N, 16]."""
        digits = b"".join(
            chunk.buffers()[2][32 * chunk.offset : 32 * (chunk.offset + len(chunk))]
            for chunk in self.table["image_id"].chunks
            if len(chunk)
        )
        return _from_hex(np.frombuffer(digits, np.uint8)).reshape(-1, 16)

    def shard_ids(self, shard: CatalogShard) -> npt.NDArray[np.uint8]:
        """Return the image ids of one shard, uint8 [n, 16], ascending."""
        return self.ids[shard.first_row : shard.first_row + shard.num_rows]

    def num_shards(self) -> dict[Bucket, int]:
        """Return how many shards each bucket has; the next one gets that number."""
        counts: dict[Bucket, int] = {}
        for shard in self.shards:
            counts[shard.bucket] = max(counts.get(shard.bucket, 0), shard.number + 1)
        return counts

    def known_files(self) -> KnownFiles:
        """Return what is known of each source; the latest row counts."""
        return KnownFiles(self.table)

    def images(self) -> Iterator[CataloguedImage]:
        """Yield every image, in the order of the rows."""
        for cells in _cells(self.table, CataloguedImage._fields):
            yield CataloguedImage(*cells)


def _cells(table: pa.Table, columns: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the cells of each row; only a few thousand rows are Python objects at once."""
    selected = table.select(columns)
    for start in range(0, table.num_rows, _ROWS_AT_ONCE):
        part = selected.slice(start, _ROWS_AT_ONCE)
        yield from zip(*(part[name].to_pylist() for name in columns), strict=True)


def _read_segment(directory: Directory, number: int) -> Segment:
    name = segment_name(number)
    where = str(directory.path / name)
    try:
        content = directory.read(name, MAX_SEGMENT_BYTES)
    except FileNotFoundError as error:
        raise CorruptError(
            "there is no such catalog segment",
            expected="all segments from 0 on",
            where=where,
            action=RESTORE_CATALOG,
        ) from error
    return decode_segment(content, where)


def _require_chain(segment: Segment, predecessors: list[Segment], number: int, where: str) -> None:
    header = segment.header
    if header.n != number:
        raise IncompatibleError(
            f"is segment {header.n} by its header", expected=f"{number}, its name", where=where
        )
    predecessor_sha256 = predecessors[-1].sha256 if predecessors else ""
    if header.predecessor_sha256 != predecessor_sha256:
        raise IncompatibleError(
            f"follows a segment of sha256 {header.predecessor_sha256 or 'none'}",
            expected=f"{predecessor_sha256 or 'none'}, as its predecessor has",
            where=where,
            action=RESTORE_CATALOG,
        )


def _from_hex(digits: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the bytes that ASCII digits 0-9 and a-f spell, uint8 [n / 2]."""
    values = np.where(digits < ord("a"), digits - ord("0"), digits - (ord("a") - 10))
    return (values[::2] << 4 | values[1::2]).astype(np.uint8)
