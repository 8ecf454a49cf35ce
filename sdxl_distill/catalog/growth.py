"""How a catalog grows by a scan: which images are new, and which new shards they go to.

Planning is pure. Committed images keep bucket, shard and caption permanently: new ones go to
new shards at the end, and a short last shard is never filled up. Publishing is create-only; a
launch that loses the race for a number plans once more against the winner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, Literal

import pyarrow as pa
import pyarrow.compute as pc

from sdxl_distill.catalog.captions import CAPTION_FIELDS, CAPTION_SUFFIXES, METADATA_NAME
from sdxl_distill.catalog.catalog import Catalog
from sdxl_distill.catalog.row_check import require_legal_rows
from sdxl_distill.catalog.scan import BadImage, Scan, ScannedImage
from sdxl_distill.catalog.segment import (
    CatalogRow,
    SegmentHeader,
    decode_segment,
    encode_segment,
    segment_name,
    to_rows,
)
from sdxl_distill.core.bucket import Bucket, cover_crop, nearest_bucket
from sdxl_distill.errors import ConfigError, IncompatibleError, StorageError
from sdxl_distill.fingerprint import fingerprint
from sdxl_distill.limits import MAX_SEGMENT_TEXT_BYTES
from sdxl_distill.storage.fsio import Directory

OnChangedCaption = Literal["error", "keep"]
Accept = Callable[[Mapping[Bucket, int], Sequence[CatalogRow]], None]
"""Refuses new images by raising; called with each bucket's number of shards, and the new rows."""
_NUM_NAMES_IN_ERRORS: Final = 5
_NUM_FIELDS_IN_ERRORS: Final = 20
_NUM_ATTEMPTS: Final = 2
_MIN_EMPTY_CAPTIONS: Final = 5
_ROWS_AT_ONCE: Final = 4096


@dataclass(frozen=True)
class ScanReport:
    """What a scan means for a catalog, for the closing summary; names are sources.

    Attributes:
        num_images: distinct images in the folder.
        num_duplicates: further files with the bytes of one of these.
        num_new: images that the catalog did not have.
        num_empty_captions: distinct images without a caption.
        new_per_bucket: `num_new` by bucket.
        bad_images: images left out, with reasons.
        differing_captions: images whose duplicates have other captions; the first source's counts.
        changed_captions: images in the catalog whose caption has changed; the old one stays.
        deleted: images in the catalog that the folder no longer has; they stay.
        mounts: folders on other devices than the image folder, as `Scan.mounts`.
    """

    num_images: int
    num_duplicates: int
    num_new: int
    num_empty_captions: int
    new_per_bucket: Mapping[Bucket, int]
    bad_images: tuple[BadImage, ...]
    differing_captions: tuple[str, ...]
    changed_captions: tuple[str, ...]
    deleted: tuple[str, ...]
    mounts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Growth:
    """The sorted rows of the next segment, none if nothing is new, and the report."""

    rows: tuple[CatalogRow, ...]
    report: ScanReport


def grow(
    catalog: Catalog,
    scan: Scan,
    *,
    buckets: Sequence[Bucket],
    records_per_shard: int,
    on_changed_caption: OnChangedCaption = "error",
) -> Growth:
    """Plan the next segment; touches nothing.

    Args:
        catalog: the committed images.
        scan: the folder's present content.
        buckets: the resolutions; each image goes to the nearest.
        records_per_shard: the most images in one shard.
        on_changed_caption: the response to a changed caption of a committed image.

    Raises:
        IncompatibleError: for changed captions with `on_changed_caption: error`.
    """
    # One image may lie in several files; the first in the order of sources counts.
    files_by_id: dict[str, list[ScannedImage]] = {}
    for file in sorted(scan.images, key=lambda file: file.source):
        files_by_id.setdefault(file.image_id, []).append(file)
    # What is committed stays as it is.
    changed, deleted, committed = _compare(catalog, files_by_id)
    if changed and on_changed_caption == "error":
        raise _changed_captions_error(changed, str(scan.image_dir))
    # What is new goes to new shards.
    firsts = [files[0] for files in files_by_id.values()]
    new = [file for file in firsts if file.image_id not in committed]
    rows = _cut(new, catalog.num_shards(), buckets, records_per_shard)
    report = ScanReport(
        num_images=len(firsts),
        num_duplicates=len(scan.images) - len(firsts),
        num_new=len(new),
        num_empty_captions=sum(not file.caption for file in firsts),
        new_per_bucket=Counter(row.bucket for row in rows),
        bad_images=scan.bad_images,
        differing_captions=tuple(
            files[0].source
            for files in files_by_id.values()
            if len({file.caption for file in files}) > 1
        ),
        changed_captions=tuple(sorted(changed)),
        deleted=tuple(sorted(deleted)),
        mounts=scan.mounts,
    )
    return Growth(rows, report)


def extend_catalog(
    directory: Directory,
    scan: Scan,
    *,
    buckets: Sequence[Bucket],
    records_per_shard: int,
    on_changed_caption: OnChangedCaption = "error",
    accept: Accept | None = None,
    max_text_bytes: int = MAX_SEGMENT_TEXT_BYTES,
) -> tuple[Catalog, ScanReport]:
    """Publish what is new as the next segment and return the catalog with it.

    Without new images the catalog stays as it is. `accept` sees the new rows before that. More
    text than `max_text_bytes` goes into several segments, cut between shards.

    Raises:
        IncompatibleError: as `grow`.
        ConfigError: as `accept` raises it, or when the text of one shard alone is more.
        StorageError: when others published twice in the meantime, or the disk refuses.
    """
    for _ in range(_NUM_ATTEMPTS):
        # Plan against what is there now.
        catalog = Catalog.load(directory)
        growth = grow(
            catalog,
            scan,
            buckets=buckets,
            records_per_shard=records_per_shard,
            on_changed_caption=on_changed_caption,
        )
        if not growth.rows:
            return catalog, growth.report
        if accept is not None:
            accept(catalog.num_shards(), growth.rows)
        # Publish; another launch may have taken the number meanwhile.
        n = _publish(directory, catalog, scan.started_ns, growth.rows, max_text_bytes)
        if n is not None:
            return Catalog.load(directory, n), growth.report
    raise StorageError(
        "other launches published catalog segments in the meantime, twice",
        where=str(directory.path),
        action="run again; the images that are new by then go to the next segment",
    )


def require_captions(catalog: Catalog, scan: Scan) -> None:
    """Refuse a scan most of whose new images have no caption.

    Raises:
        ConfigError: with the count, some names, and what `metadata.jsonl` holds instead.
    """
    if sum(not image.caption for image in scan.images) < _MIN_EMPTY_CAPTIONS:
        return  # most folders: no copy of 10^7 images is made then
    options = pc.SetLookupOptions(catalog.table["image_id"])
    ids = pa.array((image.image_id for image in scan.images), pa.string(), size=len(scan.images))
    is_known = pc.call_function("is_in", [ids], options).to_numpy(zero_copy_only=False)
    files = zip(reversed(scan.images), is_known[::-1], strict=True)
    new = {image.image_id: image for image, known in files if not known}
    empty = sorted(image.source for image in new.values() if not image.caption)
    if len(empty) < _MIN_EMPTY_CAPTIONS or 2 * len(empty) <= len(new):
        return
    fields = ", ".join(scan.metadata_fields[:_NUM_FIELDS_IN_ERRORS])
    instead = f"; {METADATA_NAME} has the fields {fields}" if fields else ""
    names = " or ".join(f"{{stem}}{suffix}" for suffix in CAPTION_SUFFIXES)
    raise ConfigError(
        f"{len(empty)} of {len(new)} new images have no caption: {_some(empty)}{instead}",
        expected=f"{names} next to an image, or {METADATA_NAME} with one of "
        f"{', '.join(CAPTION_FIELDS)}",
        where=str(scan.image_dir),
        action="name captions like this, or set data.allow_empty_captions: true to train without",
    )


def _publish(
    directory: Directory,
    catalog: Catalog,
    scan_started_ns: int,
    rows: Sequence[CatalogRow],
    max_text_bytes: int,
) -> int | None:
    """Publish rows as the next segments; return the last one's number, None when overtaken."""
    n, predecessor = catalog.n, catalog.sha256
    for part in list(_parts(rows, max_text_bytes)):  # refused before the first one is published
        n += 1
        name = segment_name(n)
        content = encode_segment(SegmentHeader(n, predecessor, scan_started_ns, len(part)), part)
        predecessor = _read_back(content, name, part)
        if not directory.publish_bytes(name, content):
            return None
    return n


def _read_back(content: bytes, name: str, rows: Sequence[CatalogRow]) -> str:
    """Check that a segment can be read before a reader has to; return its SHA-256."""
    segment = decode_segment(content, name)
    require_legal_rows(segment.table, name)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        read = to_rows(segment.table.slice(start, _ROWS_AT_ONCE))
        assert read == list(rows[start : start + _ROWS_AT_ONCE]), name
    return segment.sha256


def _parts(rows: Sequence[CatalogRow], max_text_bytes: int) -> Iterator[list[CatalogRow]]:
    """Cut sorted rows between shards, so that no part has more text than `max_text_bytes`.

    Raises:
        ConfigError: when one shard has more.
    """
    part: list[CatalogRow] = []
    part_bytes = 0
    for place, group in groupby(rows, key=lambda row: (row.bucket, row.shard)):
        shard = list(group)
        num_bytes = sum(map(_text_bytes, shard))
        if num_bytes > max_text_bytes:
            raise ConfigError(
                f"the captions of shard {place[1]} of {place[0].width}x{place[0].height} take "
                f"{num_bytes} bytes",
                expected=f"at most {max_text_bytes}",
                action="lower data.records_per_shard, or shorten the captions",
            )
        if part and part_bytes + num_bytes > max_text_bytes:
            yield part
            part, part_bytes = [], 0
        part += shard
        part_bytes += num_bytes
    yield part


def _text_bytes(row: CatalogRow) -> int:
    return len(row.source.encode()) + sum(len(caption.encode()) for caption in row.captions)


def _some(names: Sequence[str]) -> str:
    more = ", …" if len(names) > _NUM_NAMES_IN_ERRORS else ""
    return ", ".join(names[:_NUM_NAMES_IN_ERRORS]) + more


def _compare(
    catalog: Catalog, files_by_id: Mapping[str, Sequence[ScannedImage]]
) -> tuple[list[str], list[str], set[str]]:
    """Return sources of changed captions, sources that are gone, and the ids found again."""
    changed: list[str] = []
    deleted: list[str] = []
    committed: set[str] = set()
    for image in catalog.images():
        files = files_by_id.get(image.image_id)
        if files is None:
            deleted.append(image.source)
            continue
        committed.add(files[0].image_id)  # the scan's own string: no second one for 10^7 images
        # A moved image is no longer at its source: then the first of its files speaks for it.
        file = next((file for file in files if file.source == image.source), files[0])
        if fingerprint([file.caption]) != image.captions_sha256:
            changed.append(image.source)
    return changed, deleted, committed


def _cut(
    new: Iterable[ScannedImage],
    num_shards: Mapping[Bucket, int],
    buckets: Sequence[Bucket],
    records_per_shard: int,
) -> tuple[CatalogRow, ...]:
    by_bucket: dict[Bucket, list[ScannedImage]] = {}
    for image in sorted(new, key=lambda image: image.image_id):
        bucket = nearest_bucket(image.width, image.height, buckets)
        by_bucket.setdefault(bucket, []).append(image)
    return tuple(
        _row(image, bucket, num_shards.get(bucket, 0) + position // records_per_shard)
        for bucket in sorted(by_bucket)
        for position, image in enumerate(by_bucket[bucket])
    )


def _row(image: ScannedImage, bucket: Bucket, shard: int) -> CatalogRow:
    return CatalogRow(
        image_id=image.image_id,
        source=image.source,
        num_bytes=image.num_bytes,
        mtime_ns=image.mtime_ns,
        width=image.width,
        height=image.height,
        bucket=bucket,
        crop=cover_crop(image.width, image.height, bucket),
        captions=(image.caption,),
        shard=shard,
    )


def _changed_captions_error(changed: Sequence[str], where: str) -> IncompatibleError:
    return IncompatibleError(
        f"the captions of {len(changed)} images changed since they were catalogued: "
        f"{_some(sorted(changed))}",
        expected="the captions that their latents were committed with",
        where=where,
        action="put the captions back, keep the old ones with data.on_changed_caption: keep, or "
        "use the new ones with build_latents --rebuild",
    )
