"""One write-once catalog segment: rows ↔ bytes of `catalog-{n:06d}.parquet`.

The header in the file's metadata names its number, its predecessor's sha256 and when its scan
began; next to it is a digest of every byte of the file. Equal header and rows give equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_distill.core.bucket import Bucket, CoverCrop
from sdxl_distill.core.image_id import record_key
from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.fingerprint import canonical_json, fingerprint
from sdxl_distill.limits import MAX_SEGMENTS

SEGMENT_FORMAT_VERSION: Final = 2
RESTORE_CATALOG: Final = (
    "put the folder catalog back from a copy of the set, or build the set again with "
    "build_latents --rebuild; its predictions are then built again too"
)
_VERSION_WITHOUT_DIGEST: Final = 1
_HEADER_KEY: Final = b"catalog"
_DIGEST_PREFIX: Final = b'{"digest":"'
_NO_DIGEST: Final = "0" * 64
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_ROWS_AT_ONCE: Final = 1024  # captions have at most 1 MiB each
_MAX_INT64: Final = (1 << 63) - 1
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
        width: width of the upright image, pixels.
        height: its height, pixels.
        bucket: the resolution that it is trained at.
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
        predecessor_sha256: the SHA-256 of segment n-1, "" for the first.
        scan_started_ns: start of the scan, nanoseconds since 1970; files changed well before that
            need no second look.
        num_rows: the number of rows, at least 1.
    """

    n: int
    predecessor_sha256: str
    scan_started_ns: int
    num_rows: int
    format_version: int = SEGMENT_FORMAT_VERSION


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
        sealed = {"digest": _NO_DIGEST, "header": fields, "sha256": fingerprint(fields)}
        writer.add_key_value_metadata({_HEADER_KEY: canonical_json(sealed)})
    content = sink.getvalue()
    start = content.rindex(_DIGEST_PREFIX) + len(_DIGEST_PREFIX)
    digest = hashlib.sha256(content).hexdigest().encode()
    return b"".join((content[:start], digest, content[start + len(digest) :]))


def decode_segment(content: bytes, where: str) -> Segment:
    """Read a segment's bytes.

    Raises:
        CorruptError: when they are damaged, cut short or not of this schema.
        IncompatibleError: when a later version wrote them.
    """
    sha256, has_digest = _check_digest(content, where)
    try:
        # One thread, no read-ahead: after a damaged page pyarrow's pools aborted at exit.
        with pq.ParquetFile(
            pa.BufferReader(content), page_checksum_verification=True, pre_buffer=False
        ) as file:
            header = _parse_header(file.metadata.metadata or {}, where)
            table = _read_rows(file)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        raise CorruptError(
            f"not a catalog segment: {error}", where=where, action=RESTORE_CATALOG
        ) from error
    if header.format_version != _VERSION_WITHOUT_DIGEST and not has_digest:
        raise CorruptError("without its digest", where=where, action=RESTORE_CATALOG)
    table = table.replace_schema_metadata()
    if not table.schema.equals(SCHEMA) or table.num_rows != header.num_rows:
        raise CorruptError(
            f"{table.num_rows} rows of columns {table.schema.names}",
            expected=f"{header.num_rows} rows of columns {SCHEMA.names}",
            where=where,
            action=RESTORE_CATALOG,
        )
    return Segment(header, table, sha256)


def to_rows(table: pa.Table) -> list[CatalogRow]:
    """Return the rows of a table, or of a slice of one."""
    return [_from_cells(cells) for cells in table.to_pylist()]


def _read_rows(file: pq.ParquetFile) -> pa.Table:
    """Return all rows; in small pieces if they have more text than 32-bit offsets reach."""
    try:
        return file.read(use_threads=False)
    except pa.ArrowNotImplementedError:
        pieces = file.iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False)
        return pa.Table.from_batches(pieces, schema=file.schema_arrow)


def _check_digest(content: bytes, where: str) -> tuple[str, bool]:
    """Return the SHA-256 of a segment's bytes, and whether they carry their own digest.

    Checked before pyarrow sees them: not every byte that it reads has a checksum of its own.
    Segments of version 1 have no digest.

    Raises:
        CorruptError: when they do not match that digest.
    """
    start = content.rfind(_DIGEST_PREFIX) + len(_DIGEST_PREFIX)
    end = start + len(_NO_DIGEST)
    if start < len(_DIGEST_PREFIX) or end > len(content):
        return hashlib.sha256(content).hexdigest(), False
    view = memoryview(content)
    whole = hashlib.sha256(view[:start])
    without_digest = whole.copy()
    whole.update(view[start:])
    without_digest.update(_NO_DIGEST.encode())
    without_digest.update(view[end:])
    if without_digest.hexdigest().encode() != content[start:end]:
        raise CorruptError(
            "bytes that do not match the segment's digest",
            where=where,
            action=RESTORE_CATALOG,
        )
    return whole.hexdigest(), True


def _parse_header(metadata: dict[bytes, bytes], where: str) -> SegmentHeader:
    # Sealed by its own digest.
    sealed: Any = json.loads(metadata.get(_HEADER_KEY, b"null"))
    fields = sealed.get("header") if isinstance(sealed, dict) else None
    if not isinstance(fields, dict) or sealed.get("sha256") != fingerprint(fields):
        raise CorruptError(
            "no catalog header, or a damaged one", where=where, action=RESTORE_CATALOG
        )
    # Of a version that is known here, with exactly its fields.
    version = fields.get("format_version")
    if _is_between(version, SEGMENT_FORMAT_VERSION + 1, _MAX_INT64):
        raise IncompatibleError(
            f"catalog format {version}",
            expected=f"at most {SEGMENT_FORMAT_VERSION}",
            where=where,
            action="use the version of sdxl_distill that wrote it",
        )
    if fields.keys() != _IS_LEGAL.keys():
        raise CorruptError(
            "a header with unexpected fields",
            expected=", ".join(_IS_LEGAL),
            where=where,
            action=RESTORE_CATALOG,
        )
    for name, is_legal in _IS_LEGAL.items():
        if not is_legal(fields[name]):
            raise CorruptError(
                f"an illegal {name} in the header: {fields[name]!r:.80}",
                where=where,
                action=RESTORE_CATALOG,
            )
    return SegmentHeader(**fields)


def _is_between(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_sha256_or_empty(value: Any) -> bool:
    return isinstance(value, str) and (not value or _SHA256.fullmatch(value) is not None)


_IS_LEGAL: Final[dict[str, Callable[[Any], bool]]] = {
    "n": lambda value: _is_between(value, 0, MAX_SEGMENTS - 1),
    "predecessor_sha256": _is_sha256_or_empty,
    "scan_started_ns": lambda value: _is_between(value, -_MAX_INT64, _MAX_INT64),
    "num_rows": lambda value: _is_between(value, 1, _MAX_INT64),
    "format_version": lambda value: _is_between(value, 1, SEGMENT_FORMAT_VERSION),
}


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
