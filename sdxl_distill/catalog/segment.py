"""One write-once catalog segment: rows ↔ bytes of `catalog-{n:06d}.parquet`.

The header in the file's metadata names its number, its predecessor's sha256 and when its scan
began. Pages carry checksums. Equal header and rows give equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_distill.core.bucket import Bucket, CoverCrop
from sdxl_distill.core.image_id import record_key
from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.fingerprint import canonical_json, fingerprint

FORMAT_VERSION: Final = 1
MAX_SEGMENT_BYTES: Final = 4 << 30
_HEADER_KEY: Final = b"catalog"
_NAME: Final = re.compile(r"catalog-([0-9]{6})\.parquet")
_COLUMNS: Final[tuple[tuple[str, pa.DataType], ...]] = (
    ("image_id", pa.string()),
    ("source", pa.string()),
    ("bytes", pa.int64()),
    ("mtime_ns", pa.int64()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("bucket_width", pa.int32()),
    ("bucket_height", pa.int32()),
    ("resized_width", pa.int32()),
    ("resized_height", pa.int32()),
    ("crop_left", pa.int32()),
    ("crop_top", pa.int32()),
    ("captions", pa.list_(pa.field("element", pa.string(), nullable=False))),
    ("captions_sha256", pa.string()),
    ("subset", pa.string()),
    ("shard", pa.int32()),
)
SCHEMA: Final = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _COLUMNS])


@dataclass(frozen=True)
class CatalogRow:
    """One image of the catalog.

    Attributes:
        image_id: 32 hex digits of the SHA-256 of the file's bytes.
        source: path relative to the image folder, with slashes.
        num_bytes: size of the file when it was scanned.
        mtime_ns: its modification time then, nanoseconds since 1970.
        width: of the upright image, pixels.
        height: likewise.
        bucket: what it is trained at.
        crop: the cover-resize and the corner of the crop.
        captions: one caption, "" when there is none.
        shard: number among its bucket's shards.
    """

    image_id: str
    source: str
    num_bytes: int
    mtime_ns: int
    width: int
    height: int
    bucket: Bucket
    crop: CoverCrop
    captions: tuple[str, ...]
    shard: int

    @property
    def key(self) -> str:
        """The key of its records in all sets."""
        return record_key(self.image_id, *self.bucket)

    @property
    def captions_sha256(self) -> str:
        """SHA-256 of the canonical JSON of the captions."""
        return fingerprint(list(self.captions))

    @property
    def subset(self) -> str:
        """The source folder, "" for images at the top."""
        return self.source.rpartition("/")[0]

    @property
    def place(self) -> tuple[Bucket, int, str]:
        """What rows are sorted by: bucket, shard, image id."""
        return self.bucket, self.shard, self.image_id


@dataclass(frozen=True)
class SegmentHeader:
    """Where a segment belongs.

    Attributes:
        n: its number; the catalog's version once it is there.
        predecessor_sha256: of the bytes of segment n-1, "" for the first.
        scan_started_ns: nanoseconds since 1970; files changed well before need no second look.
        num_rows: at least 1.
    """

    n: int
    predecessor_sha256: str
    scan_started_ns: int
    num_rows: int
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, eq=False)
class Segment:
    """A segment as read: header, table of `SCHEMA`, SHA-256 of its bytes."""

    header: SegmentHeader
    table: pa.Table
    sha256: str


def segment_name(n: int) -> str:
    """Return the file name of segment n."""
    return f"catalog-{n:06d}.parquet"


def segment_number(name: str) -> int | None:
    """Return n of a segment's file name, None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def encode_segment(header: SegmentHeader, rows: Sequence[CatalogRow]) -> bytes:
    """Return the bytes of a segment; `rows` sorted by `place`."""
    assert len(rows) == header.num_rows
    columns = zip(*map(_to_cells, rows), strict=True)
    arrays = [
        pa.array(column, type=kind) for column, (_, kind) in zip(columns, _COLUMNS, strict=True)
    ]
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink, SCHEMA, compression="zstd", store_schema=False, write_page_checksum=True
    ) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA))
        fields = asdict(header)
        # Pages have checksums of their own, the metadata has none.
        sealed = {"header": fields, "sha256": fingerprint(fields)}
        writer.add_key_value_metadata({_HEADER_KEY: canonical_json(sealed)})
    return sink.getvalue()


def decode_segment(content: bytes, where: str) -> Segment:
    """Read a segment's bytes.

    Raises:
        CorruptError: when they are damaged, cut short or not of this schema.
        IncompatibleError: when a later version wrote them.
    """
    try:
        # One thread, no read-ahead: after a damaged page pyarrow's pools aborted at exit.
        with pq.ParquetFile(
            pa.BufferReader(content), page_checksum_verification=True, pre_buffer=False
        ) as file:
            header = _parse_header(file.metadata.metadata or {}, where)
            table = file.read(use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptError(f"no catalog segment: {error}", where=where) from error
    if not table.schema.equals(SCHEMA) or table.num_rows != header.num_rows:
        raise CorruptError(
            f"{table.num_rows} rows of columns {table.schema.names}",
            expected=f"{header.num_rows} rows of columns {SCHEMA.names}",
            where=where,
        )
    table = table.replace_schema_metadata()
    return Segment(header, table, hashlib.sha256(content).hexdigest())


def to_rows(table: pa.Table) -> list[CatalogRow]:
    """Return the rows of a table, or of a slice of one."""
    return [_from_cells(cells) for cells in table.to_pylist()]


def _parse_header(metadata: dict[bytes, bytes], where: str) -> SegmentHeader:
    sealed: Any = json.loads(metadata.get(_HEADER_KEY, b"null"))
    fields = sealed.get("header") if isinstance(sealed, dict) else None
    if not isinstance(fields, dict) or sealed.get("sha256") != fingerprint(fields):
        raise CorruptError("no catalog header, or a damaged one", where=where)
    if fields.get("format_version") != FORMAT_VERSION:
        raise IncompatibleError(
            f"catalog format {fields.get('format_version')}",
            expected=str(FORMAT_VERSION),
            where=where,
            action="use the version of sdxl_distill that wrote it",
        )
    try:
        return SegmentHeader(**fields)
    except TypeError as error:
        raise CorruptError(f"fields of the header: {error}", where=where) from error


def _to_cells(row: CatalogRow) -> tuple[Any, ...]:
    return (
        row.image_id,
        row.source,
        row.num_bytes,
        row.mtime_ns,
        row.width,
        row.height,
        *row.bucket,
        *row.crop,
        list(row.captions),
        row.captions_sha256,
        row.subset,
        row.shard,
    )


def _from_cells(cells: dict[str, Any]) -> CatalogRow:
    return CatalogRow(
        image_id=cells["image_id"],
        source=cells["source"],
        num_bytes=cells["bytes"],
        mtime_ns=cells["mtime_ns"],
        width=cells["width"],
        height=cells["height"],
        bucket=Bucket(cells["bucket_width"], cells["bucket_height"]),
        crop=CoverCrop(
            cells["resized_width"], cells["resized_height"], cells["crop_left"], cells["crop_top"]
        ),
        captions=tuple(cells["captions"]),
        shard=cells["shard"],
    )
