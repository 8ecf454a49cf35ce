"""Planning and publishing the next segment: properties over random scans, and real races."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from sdxl_distill.catalog.catalog import Catalog
from sdxl_distill.catalog.growth import extend_catalog, grow
from sdxl_distill.catalog.scan import BadImage, Scan, ScannedImage
from sdxl_distill.catalog.segment import (
    CatalogRow,
    SegmentHeader,
    decode_segment,
    encode_segment,
    segment_name,
)
from sdxl_distill.core.bucket import Bucket, cover_crop, nearest_bucket
from sdxl_distill.errors import ConfigError, IncompatibleError, StorageError
from sdxl_distill.storage.fsio import Directory

BUCKETS = (Bucket(64, 64), Bucket(96, 64), Bucket(64, 96))


def image(number: int, caption: str = "", source: str | None = None) -> ScannedImage:
    width, height = ((50, 50), (90, 60), (60, 90))[number % 3]
    source = source or f"{number}.png"
    return ScannedImage(f"{number:032x}", source, 100, 5, width, height, caption)


def scan_of(*images: ScannedImage, bad: tuple[BadImage, ...] = (), started_ns: int = 1) -> Scan:
    return Scan(Path("images"), started_ns, images, bad)


def appended(catalog: Catalog, rows: tuple[CatalogRow, ...]) -> Catalog:
    header = SegmentHeader(catalog.n + 1, catalog.sha256, 1, len(rows))
    return Catalog((*catalog.segments, decode_segment(encode_segment(header, rows), "x")))


def catalog_of(*images: ScannedImage) -> Catalog:
    growth = grow(Catalog(), scan_of(*images), buckets=BUCKETS, records_per_shard=2)
    return appended(Catalog(), growth.rows)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with Directory(tmp_path / "catalog", create=True) as directory:
        yield directory


batches = st.lists(
    st.lists(st.integers(0, 60), min_size=1, max_size=25, unique=True), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(batches=batches, records_per_shard=st.integers(1, 6))
def test_growth_cuts_new_keys_into_new_shards_and_leaves_the_old(
    batches: list[list[int]], records_per_shard: int
) -> None:
    catalog = Catalog()
    seen: set[int] = set()
    for batch in batches:
        seen |= set(batch)
        scan = scan_of(*map(image, sorted(seen)))
        growth = grow(catalog, scan, buckets=BUCKETS, records_per_shard=records_per_shard)
        old_rows = {shard: catalog.rows(shard) for shard in catalog.shards}
        if not growth.rows:
            continue
        catalog = appended(catalog, growth.rows)
        assert {shard: catalog.rows(shard) for shard in old_rows} == old_rows
        assert list(growth.rows) == sorted(growth.rows, key=lambda row: row.place)
        for bucket in {row.bucket for row in growth.rows}:
            ids = [row.image_id for row in growth.rows if row.bucket == bucket]
            sizes = [
                shard.num_rows
                for shard in catalog.shards[len(old_rows) :]
                if shard.bucket == bucket
            ]
            assert ids == sorted(ids)
            assert all(size == records_per_shard for size in sizes[:-1])
            assert 1 <= sizes[-1] <= records_per_shard
    numbers: dict[Bucket, list[int]] = {}
    for shard in catalog.shards:
        numbers.setdefault(shard.bucket, []).append(shard.number)
    assert all(found == list(range(len(found))) for found in numbers.values())
    ids = [row.image_id for row in catalog.images()]
    assert sorted(ids) == sorted(f"{number:032x}" for number in seen)


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(12)))
def test_the_order_of_the_scan_changes_nothing(order: list[int]) -> None:
    images = [image(number % 8, f"caption {number}", f"{number:02}.png") for number in range(12)]
    expected = grow(Catalog(), scan_of(*images), buckets=BUCKETS, records_per_shard=2)
    shuffled = scan_of(*(images[place] for place in order))
    assert grow(Catalog(), shuffled, buckets=BUCKETS, records_per_shard=2) == expected


def test_a_row_has_the_nearest_bucket_and_its_crop() -> None:
    scan = scan_of(image(1, "a fox", "a/b/1.png"))
    growth = grow(Catalog(), scan, buckets=BUCKETS, records_per_shard=2)
    row = growth.rows[0]
    assert row.bucket == nearest_bucket(90, 60, BUCKETS) == Bucket(96, 64)
    assert row.crop == cover_crop(90, 60, row.bucket)
    assert (row.captions, row.subset, row.shard) == (("a fox",), "a/b", 0)


def test_nothing_new_is_no_segment() -> None:
    images = [image(number) for number in range(5)]
    growth = grow(catalog_of(*images), scan_of(*images), buckets=BUCKETS, records_per_shard=2)
    assert growth.rows == ()
    assert (growth.report.num_images, growth.report.num_new) == (5, 0)


def test_a_short_last_shard_is_never_filled_up() -> None:
    catalog = catalog_of(image(0), image(3), image(6))  # one bucket: shards of 2 and 1
    growth = grow(catalog, scan_of(*map(image, (0, 3, 6, 9))), buckets=BUCKETS, records_per_shard=2)
    assert [row.shard for row in growth.rows] == [2]


def test_duplicates_make_one_record_with_the_caption_of_the_smallest_source() -> None:
    images = [image(1, "second", "b.png"), image(1, "first", "a.png"), image(1, "first", "c.png")]
    growth = grow(Catalog(), scan_of(*images), buckets=BUCKETS, records_per_shard=2)
    assert [(row.source, row.captions) for row in growth.rows] == [("a.png", ("first",))]
    assert (growth.report.num_images, growth.report.num_duplicates) == (1, 2)
    assert growth.report.differing_captions == ("a.png",)


def test_a_new_copy_of_a_committed_image_is_a_duplicate_even_with_a_smaller_name() -> None:
    catalog = catalog_of(image(1, "old", "b.png"))
    scan = scan_of(image(1, "new", "a.png"), image(1, "old", "b.png"))
    growth = grow(catalog, scan, buckets=BUCKETS, records_per_shard=2)
    assert growth.rows == () and growth.report.num_duplicates == 1
    assert growth.report.changed_captions == ()


def test_a_changed_caption_of_a_committed_image_is_refused_with_count_and_names() -> None:
    catalog = catalog_of(*(image(number, "old") for number in range(8)))
    scan = scan_of(*(image(number, "new" if number != 3 else "old") for number in range(8)))
    with pytest.raises(
        IncompatibleError, match=r"captions of 7 images .*: 0.png, 1.png, 2.png, "
    ) as e:
        grow(catalog, scan, buckets=BUCKETS, records_per_shard=2)
    assert "data.on_changed_caption" in str(e.value)
    assert "build_latents --rebuild" in str(e.value)


def test_a_changed_caption_is_kept_out_and_reported_on_request() -> None:
    catalog = catalog_of(image(0, "old"))
    growth = grow(
        catalog,
        scan_of(image(0, "new"), image(1)),
        buckets=BUCKETS,
        records_per_shard=2,
        on_changed_caption="keep",
    )
    assert growth.report.changed_captions == ("0.png",)
    assert [row.source for row in growth.rows] == ["1.png"]


def test_a_moved_image_with_its_caption_is_neither_changed_nor_deleted() -> None:
    catalog = catalog_of(image(0, "same", "here/0.png"))
    scan = scan_of(image(0, "same", "there/0.png"))
    report = grow(catalog, scan, buckets=BUCKETS, records_per_shard=2).report
    assert (report.changed_captions, report.deleted, report.num_new) == ((), (), 0)


def test_the_report_counts_everything_else() -> None:
    catalog = catalog_of(image(0, "old"), image(2, "gone"))
    scan = scan_of(
        image(0, "old"), image(1), image(4), image(5, "five"), bad=(BadImage("x.png", "is empty"),)
    )
    report = grow(catalog, scan, buckets=BUCKETS, records_per_shard=2).report
    assert report.deleted == ("2.png",)
    assert report.num_empty_captions == 2
    assert report.new_per_bucket == {Bucket(96, 64): 2, Bucket(64, 96): 1}
    assert report.bad_images == (("x.png", "is empty"),)


def extend(directory: Directory, scan: Scan) -> Catalog:
    return extend_catalog(directory, scan, buckets=BUCKETS, records_per_shard=2)[0]


def test_extending_publishes_once_and_repeats_nothing(directory: Directory) -> None:
    scan = scan_of(*map(image, range(5)), started_ns=77)
    catalog = extend(directory, scan)
    assert (catalog.n, catalog.num_images, catalog.scan_started_ns) == (0, 5, 77)
    again = extend(directory, scan_of(*map(image, range(5)), started_ns=99))
    assert again.sha256 == catalog.sha256
    grown = extend(directory, scan_of(*map(image, range(6))))
    assert (grown.n, grown.num_images) == (1, 6)
    assert directory.names() == {segment_name(0), segment_name(1)}


def test_the_same_scan_gives_the_same_bytes(tmp_path: Path) -> None:
    scan = scan_of(*map(image, range(9)))
    contents = []
    for name in ("one", "two"):
        with Directory(tmp_path / name, create=True) as directory:
            extend(directory, scan)
            contents.append((directory.path / segment_name(0)).read_bytes())
    assert contents[0] == contents[1]


class OvertakenDirectory(Directory):
    """A directory in which a rival publishes just before each of the first publications."""

    rivals: tuple[Scan, ...] = ()

    def publish_bytes(self, name: str, content: bytes) -> bool:
        if self.rivals:
            rival, self.rivals = self.rivals[0], self.rivals[1:]
            with Directory(self.path) as other:
                extend(other, rival)
        return super().publish_bytes(name, content)


def test_the_loser_of_a_race_adds_only_what_the_winner_lacks(tmp_path: Path) -> None:
    with OvertakenDirectory(tmp_path / "catalog", create=True) as directory:
        directory.rivals = (scan_of(*map(image, range(0, 6))),)
        catalog = extend(directory, scan_of(*map(image, range(3, 9))))
    assert catalog.n == 1
    ids = [row.image_id for row in catalog.images()]
    assert {int(image_id, 16) for image_id in ids[:6]} == set(range(6))
    assert sorted(ids) == [f"{number:032x}" for number in range(9)]


def test_the_loser_whose_images_the_winner_has_publishes_nothing(tmp_path: Path) -> None:
    scan = scan_of(*map(image, range(4)))
    with OvertakenDirectory(tmp_path / "catalog", create=True) as directory:
        directory.rivals = (scan,)
        assert extend(directory, scan).n == 0


def test_who_loses_twice_is_told(tmp_path: Path) -> None:
    with OvertakenDirectory(tmp_path / "catalog", create=True) as directory:
        directory.rivals = (scan_of(image(1)), scan_of(image(1), image(2)))
        with pytest.raises(StorageError, match="twice"):
            extend(directory, scan_of(*map(image, range(5))))


def test_scans_that_race_for_real_end_in_one_chain_of_all_images(tmp_path: Path) -> None:
    for trial in range(10):
        path = tmp_path / str(trial)
        path.mkdir()

        def launch(first: int, path: Path = path) -> None:
            with Directory(path) as directory:
                extend(directory, scan_of(*map(image, range(first, first + 5))))

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(launch, (0, 3)))
        with Directory(path) as directory:
            ids = [row.image_id for row in Catalog.load(directory).images()]
        assert sorted(ids) == [f"{number:032x}" for number in range(8)]


def test_more_text_than_a_segment_holds_goes_into_several(directory: Directory) -> None:
    scan = scan_of(*(image(number, "x" * 1000) for number in range(30)))
    catalog, report = extend_catalog(
        directory, scan, buckets=BUCKETS, records_per_shard=2, max_text_bytes=5000
    )
    assert report.num_new == catalog.num_images == 30
    assert catalog.n == 7  # two shards of 2 each
    assert Catalog.load(directory).sha256 == catalog.sha256
    whole = grow(Catalog(), scan, buckets=BUCKETS, records_per_shard=2)
    rows = [row for shard in catalog.shards for row in catalog.rows(shard)]
    assert rows == list(whole.rows)


def test_a_launch_killed_between_two_segments_is_continued(directory: Directory) -> None:
    scan = scan_of(*(image(number, "x" * 1000) for number in range(30)))

    def extend_cut(first: Scan) -> Catalog:
        options = {"buckets": BUCKETS, "records_per_shard": 2, "max_text_bytes": 5000}
        return extend_catalog(directory, first, **options)[0]

    extend_cut(scan)
    for n in range(3, 8):
        directory.remove(segment_name(n))
    catalog = extend_cut(scan)
    ids = [row.image_id for row in catalog.images()]
    assert sorted(ids) == [f"{number:032x}" for number in range(30)]


def test_a_shard_with_more_text_than_a_segment_holds_is_refused(directory: Directory) -> None:
    scan = scan_of(image(0, "x" * 1000))
    with pytest.raises(ConfigError, match=r"shard 0 of 64x64 take \d+ bytes"):
        extend_catalog(directory, scan, buckets=BUCKETS, records_per_shard=2, max_text_bytes=900)
    assert directory.names() == set()


def test_a_refused_shard_leaves_no_segment_of_the_shards_before_it(directory: Directory) -> None:
    texts = ["x" * (1000 if number % 3 == 1 else 400) for number in range(6)]  # of the last bucket
    scan = scan_of(*(image(number, text) for number, text in enumerate(texts)))
    with pytest.raises(ConfigError, match=r"shard 0 of 96x64 take \d+ bytes"):
        extend_catalog(directory, scan, buckets=BUCKETS, records_per_shard=2, max_text_bytes=900)
    assert directory.names() == set()
