"""Rows from strangers: what a scan cannot give is refused when a segment is read, or verified."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdxl_distill.catalog.catalog import Catalog
from sdxl_distill.catalog.row_check import wrong_rows
from sdxl_distill.catalog.segment import (
    CatalogRow,
    Segment,
    SegmentHeader,
    decode_segment,
    encode_segment,
    segment_name,
)
from sdxl_distill.core.bucket import Bucket, CoverCrop, cover_crop
from sdxl_distill.errors import CorruptError
from sdxl_distill.storage.fsio import Directory

BUCKET = Bucket(64, 64)


def row(number: int, **changes: Any) -> CatalogRow:
    row = CatalogRow(
        image_id=f"{number:032x}",
        source=f"a/{number}.png",
        num_bytes=1,
        mtime_ns=1,
        width=100,
        height=50,
        bucket=BUCKET,
        crop=cover_crop(100, 50, BUCKET),
        captions=("a fox",),
        shard=0,
    )
    return replace(row, **changes)


def encoded(*rows: CatalogRow) -> bytes:
    return encode_segment(SegmentHeader(0, "", 1, len(rows)), rows)


def segment_of(*rows: CatalogRow) -> Segment:
    return decode_segment(encoded(*rows), "x")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with Directory(tmp_path) as directory:
        yield directory


@pytest.mark.parametrize(
    "changes",
    [
        {"image_id": "g" * 32},
        {"image_id": "A" * 32},
        {"image_id": "a" * 31},
        {"image_id": "a" * 32 + "\n"},
        {"source": "a\0b.png"},
        {"bucket": Bucket(-64, 64)},
        {"bucket": Bucket(64, 0)},
        {"bucket": Bucket(65, 64)},
        {"bucket": Bucket(64, 1 << 20)},
        {"shard": -1},
        {"shard": 1_000_000},
        {"captions": ()},
    ],
    ids=str,
)
def test_a_value_that_no_scan_gives_is_corrupt(
    directory: Directory, changes: dict[str, Any]
) -> None:
    directory.publish_bytes(segment_name(0), encoded(row(1, **changes)))
    name = next(iter(changes))
    with pytest.raises(CorruptError, match=f"catalog-000000.parquet: an illegal {name}"):
        Catalog.load(directory)


@pytest.mark.parametrize(
    "rows",
    [
        [row(2), row(1)],
        [row(1), row(1)],
        [row(1, shard=1), row(2)],
        [row(1, bucket=Bucket(72, 64)), row(2)],
        [row(1, bucket=Bucket(64, 72)), row(2, shard=1)],
    ],
)
def test_rows_out_of_order_are_corrupt(directory: Directory, rows: list[CatalogRow]) -> None:
    directory.publish_bytes(segment_name(0), encoded(*rows))
    with pytest.raises(CorruptError, match="rows out of order"):
        Catalog.load(directory)


def test_rows_in_order_are_not(directory: Directory) -> None:
    rows = [row(3), row(4), row(1, shard=1), row(2, bucket=Bucket(64, 72)), row(0, shard=1)]
    rows.sort(key=lambda row: row.place)
    directory.publish_bytes(segment_name(0), encoded(*rows))
    catalog = Catalog.load(directory)
    assert catalog.num_images == 5
    assert [image_id.tobytes().hex() for image_id in catalog.ids] == [row.image_id for row in rows]


def test_ids_are_those_of_the_rows_over_all_segments(directory: Directory) -> None:
    ids = sorted(hashlib.sha256(b"%d" % number).hexdigest()[:32] for number in range(70))
    template = row(0)
    for n, part in enumerate((ids[:66], ids[66:])):
        predecessor = Catalog.load(directory).sha256
        rows = [replace(template, image_id=image_id, shard=n) for image_id in part]
        header = SegmentHeader(n, predecessor, 1, len(rows))
        directory.publish_bytes(segment_name(n), encode_segment(header, rows))
    catalog = Catalog.load(directory)
    assert catalog.ids.tobytes().hex() == "".join(ids)
    assert catalog.shard_ids(catalog.shards[1]).tobytes().hex() == "".join(ids[66:])


def test_a_row_whose_columns_contradict_each_other_is_named_with_the_fault() -> None:
    good, bad = row(1), row(2, crop=CoverCrop(128, 64, 31, 0))
    assert list(wrong_rows(segment_of(good))) == []
    ((key, fault),) = wrong_rows(segment_of(good, bad))
    assert key == bad.key
    assert "crop" in fault


def test_a_row_of_an_image_without_pixels_is_wrong() -> None:
    assert [key for key, _ in wrong_rows(segment_of(row(1, width=0)))] == [row(1).key]
