"""Reading a chain of segments back, and finding the rows of a shard in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sdxl_distill.catalog.catalog import Catalog, CataloguedImage, KnownFile
from sdxl_distill.catalog.segment import CatalogRow, SegmentHeader, encode_segment, segment_name
from sdxl_distill.core.bucket import Bucket, CoverCrop
from sdxl_distill.errors import CorruptError, DistillError, IncompatibleError
from sdxl_distill.storage.fsio import Directory

SQUARE, WIDE = Bucket(64, 64), Bucket(96, 64)


def row(number: int, bucket: Bucket, shard: int) -> CatalogRow:
    crop = CoverCrop(bucket.width, bucket.height, 0, 0)
    return CatalogRow(
        f"{number:032x}", f"{number}.png", 10, number, 64, 64, bucket, crop, ("",), shard
    )


FIRST = [row(1, SQUARE, 0), row(2, SQUARE, 0), row(3, SQUARE, 1), row(0, WIDE, 0)]
SECOND = [row(4, SQUARE, 2)]


def publish(directory: Directory, rows: list[CatalogRow], scan_started_ns: int = 0) -> Catalog:
    catalog = Catalog.load(directory)
    header = SegmentHeader(catalog.n + 1, catalog.sha256, scan_started_ns, len(rows))
    assert directory.publish_bytes(segment_name(header.n), encode_segment(header, rows))
    return Catalog.load(directory)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with Directory(tmp_path / "catalog", create=True) as directory:
        yield directory


def test_no_segment_is_the_empty_catalog(directory: Directory) -> None:
    catalog = Catalog.load(directory)
    assert (catalog.n, catalog.sha256, catalog.num_images, catalog.shards) == (-1, "", 0, ())
    assert catalog.num_shards() == {} and list(catalog.images()) == []


def test_shards_are_runs_of_rows_over_all_segments(directory: Directory) -> None:
    publish(directory, FIRST)
    catalog = publish(directory, SECOND, scan_started_ns=7)
    found = {(shard.bucket, shard.number): catalog.rows(shard) for shard in catalog.shards}
    assert found == {
        (SQUARE, 0): FIRST[:2],
        (SQUARE, 1): FIRST[2:3],
        (WIDE, 0): FIRST[3:],
        (SQUARE, 2): SECOND,
    }
    assert catalog.num_shards() == {SQUARE: 3, WIDE: 1}
    assert (catalog.n, catalog.num_images, catalog.scan_started_ns) == (1, 5, 7)


def test_an_earlier_version_stays_readable(directory: Directory) -> None:
    first = publish(directory, FIRST)
    publish(directory, SECOND)
    earlier = Catalog.load(directory, 0)
    assert earlier.sha256 == first.sha256
    assert earlier.table.equals(first.table)


def test_the_latest_row_of_a_source_is_the_known_one(directory: Directory) -> None:
    publish(directory, [row(1, SQUARE, 0)])
    replaced = CatalogRow(
        "f" * 32, "1.png", 11, 5, 32, 16, SQUARE, CoverCrop(128, 64, 32, 0), ("",), 1
    )
    catalog = publish(directory, [replaced])
    assert catalog.known_files().find("1.png") == KnownFile("f" * 32, 11, 5, 32, 16)
    assert catalog.known_files().find("2.png") is None
    assert [image.image_id for image in catalog.images()] == [f"{1:032x}", "f" * 32]
    assert next(catalog.images()) == CataloguedImage(
        f"{1:032x}", "1.png", row(1, SQUARE, 0).captions_sha256
    )


def test_temporary_files_are_no_segments(directory: Directory) -> None:
    publish(directory, FIRST)
    (directory.path / ".tmp-0123-1").write_bytes(b"half")
    assert Catalog.load(directory).n == 0


def test_a_missing_segment_is_named(directory: Directory) -> None:
    publish(directory, FIRST)
    publish(directory, SECOND)
    (directory.path / segment_name(0)).unlink()
    with pytest.raises(CorruptError, match=segment_name(0)):
        Catalog.load(directory)


def test_a_segment_of_another_catalog_breaks_the_chain(
    directory: Directory, tmp_path: Path
) -> None:
    publish(directory, FIRST)
    publish(directory, SECOND)
    with Directory(tmp_path / "other", create=True) as other:
        publish(other, [row(9, SQUARE, 0)])
        alien = other.path / segment_name(0)
        (directory.path / segment_name(0)).write_bytes(alien.read_bytes())
    with pytest.raises(IncompatibleError, match=f"{segment_name(1)}: follows a segment"):
        Catalog.load(directory)


def test_a_renamed_segment_is_refused(directory: Directory) -> None:
    publish(directory, FIRST)
    (directory.path / segment_name(0)).rename(directory.path / segment_name(1))
    (directory.path / segment_name(0)).write_bytes((directory.path / segment_name(1)).read_bytes())
    with pytest.raises(IncompatibleError, match="is segment 0 by its header"):
        Catalog.load(directory)


@pytest.mark.parametrize("size", [0, 10, 1000])
def test_a_segment_cut_short_is_named(directory: Directory, size: int) -> None:
    publish(directory, FIRST)
    path = directory.path / segment_name(0)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DistillError, match=segment_name(0)):
        Catalog.load(directory)
