"""Looking at a folder: what is found, what is left out, what is an error."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sdxl_distill.catalog.catalog import Catalog
from sdxl_distill.catalog.growth import extend_catalog
from sdxl_distill.catalog.image import BadImageError
from sdxl_distill.catalog.scan import Scan, scan_folder
from sdxl_distill.core.bucket import Bucket
from sdxl_distill.core.image_id import image_id
from sdxl_distill.errors import ConfigError, CorruptError, StorageError
from sdxl_distill.storage.fsio import Directory

if TYPE_CHECKING:
    from tests.catalog.conftest import WritePhoto

LONG_AGO = 1_000_000_000


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tmp_path / "images"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with Directory(tmp_path / "catalog", create=True) as directory:
        yield directory


def scan(folder: Path, catalog: Catalog | None = None, *, rescan: bool = False) -> Scan:
    return scan_folder(folder, catalog or Catalog(), max_pixels=10_000, rescan=rescan)


def sources(found: Scan) -> list[str]:
    return [image.source for image in found.images]


def captions(found: Scan) -> dict[str, str]:
    return {image.source: image.caption for image in found.images}


def test_images_are_found_recursively_and_sorted(images: Path, write_photo: WritePhoto) -> None:
    for number, name in enumerate(["b.PNG", "a/z.jpeg", "a/b/c.webp", "B.tiff", "a.bmp"]):
        write_photo(images / name, number)
    for other in ("notes.md", "video.mp4", "x.png.part", "clip.gif"):
        (images / other).write_bytes(b"no image")
    assert sources(scan(images)) == ["B.tiff", "a.bmp", "a/b/c.webp", "a/z.jpeg", "b.PNG"]


def test_identity_size_and_time_are_those_of_the_file(
    images: Path, write_photo: WritePhoto
) -> None:
    path = write_photo(images / "a.png", 0, width=30, height=20)
    image = scan(images).images[0]
    assert image.image_id == image_id(path.read_bytes())
    assert (image.num_bytes, image.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
    assert (image.width, image.height) == (30, 20)


def test_the_number_of_threads_changes_nothing(images: Path, write_photo: WritePhoto) -> None:
    for number in range(20):
        write_photo(images / f"{number}.png", number, caption=f"photo {number}")
    one, many = (
        scan_folder(images, Catalog(), max_pixels=10_000, num_threads=count) for count in (1, 7)
    )
    assert one.images == many.images


def test_hidden_files_and_folders_are_left_out(images: Path, write_photo: WritePhoto) -> None:
    write_photo(images / "a.png", 0)
    write_photo(images / "._a.png", 1)
    write_photo(images / ".cache/b.png", 2)
    assert sources(scan(images)) == ["a.png"]


def test_links_are_followed_and_loops_are_not(
    images: Path, tmp_path: Path, write_photo: WritePhoto
) -> None:
    write_photo(images / "a.png", 0)
    write_photo(tmp_path / "elsewhere/b.png", 1)
    (images / "linked").symlink_to(tmp_path / "elsewhere")
    (images / "loop").symlink_to(images)
    (tmp_path / "elsewhere/back").symlink_to(images)
    assert sources(scan(images)) == ["a.png", "linked/b.png"]


def test_every_caption_source_is_found_in_its_order(images: Path, write_photo: WritePhoto) -> None:
    for number, name in enumerate("abcd"):
        write_photo(images / f"{name}.png", number)
    write_photo(images / "sub/e.png", 9)
    (images / "a.txt").write_text("from txt")
    (images / "a.caption").write_text("from caption")
    (images / "b.caption").write_text("from caption")
    lines = [{"file_name": f"{name}.png", "text": "from metadata"} for name in "abc"]
    lines.append({"file_name": "sub/e.png", "text": "from above"})
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert captions(scan(images)) == {
        "a.png": "from txt",
        "b.png": "from caption",
        "c.png": "from metadata",
        "d.png": "",
        "sub/e.png": "from above",
    }


@pytest.mark.parametrize("make", [False, True])
def test_a_missing_or_empty_folder_is_named(images: Path, make: bool) -> None:
    if make:
        images.mkdir()
    with pytest.raises(ConfigError, match=str(images)):
        scan(images)


def test_a_file_in_place_of_the_folder_is_named(images: Path, write_photo: WritePhoto) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        scan(write_photo(images / "a.png", 0))


def test_bad_images_are_listed_with_their_reasons(images: Path, write_photo: WritePhoto) -> None:
    good = write_photo(images / "good.png", 0).read_bytes()
    (images / "empty.png").write_bytes(b"")
    (images / "gif.png").write_bytes(b"GIF89a...")
    (images / "cut.png").write_bytes(good[:20])
    write_photo(images / "large.png", 1, width=101, height=100)
    os.mkfifo(images / "pipe.png")
    (images / "nowhere.png").symlink_to("nothing")
    (images / "itself.png").symlink_to("itself.png")
    found = scan(images)
    assert sources(found) == ["good.png"]
    reasons = dict(found.bad_images)
    assert list(reasons) == sorted(reasons)
    assert reasons["empty.png"] == "is empty"
    assert reasons["gif.png"].startswith("begins with 47 49 46")
    assert reasons["cut.png"].startswith("cannot be decoded")
    assert reasons["large.png"] == "101 x 100 pixels"
    assert reasons["pipe.png"] == "is not a regular file"
    assert "leads nowhere" in reasons["nowhere.png"]
    assert "leads nowhere" in reasons["itself.png"]


def test_a_name_that_is_no_utf8_makes_a_bad_image(images: Path, write_photo: WritePhoto) -> None:
    content = write_photo(images / "a.png", 0).read_bytes()
    (images / os.fsdecode(b"caf\xe9.png")).write_bytes(content)
    assert scan(images).bad_images[0] == ("caf\\udce9.png", "its name is not UTF-8")


def test_the_first_bad_image_is_an_error_on_request(images: Path, write_photo: WritePhoto) -> None:
    write_photo(images / "a.png", 0)
    for name in ("c.png", "b.png"):
        (images / name).write_bytes(b"")
    with pytest.raises(BadImageError) as caught:
        scan_folder(images, Catalog(), max_pixels=10_000, on_bad_image="error")
    assert caught.value.source == "b.png"


def test_a_folder_of_bad_images_alone_is_an_error(images: Path) -> None:
    images.mkdir()
    (images / "a.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"none of the 1 images can be used; a.png: is empty"):
        scan(images)


def test_a_disk_that_refuses_is_an_error_and_no_bad_image(
    images: Path, write_photo: WritePhoto
) -> None:
    write_photo(images / "a.png", 0)
    (images / "b.png").symlink_to("/proc/self/mem")  # regular, and EIO at byte 0
    with pytest.raises(StorageError, match=r"b\.png"):
        scan(images)


def test_a_bad_caption_file_stops_the_scan(images: Path, write_photo: WritePhoto) -> None:
    write_photo(images / "a.png", 0)
    (images / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptError, match=r"a\.txt: byte 0 is not UTF-8"):
        scan(images)


def test_progress_counts_every_file(images: Path, write_photo: WritePhoto) -> None:
    for number in range(3):
        write_photo(images / f"{number}.png", number)
    (images / "bad.png").write_bytes(b"")
    calls: list[tuple[int, int]] = []
    scan_folder(
        images,
        Catalog(),
        max_pixels=10_000,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def replace_secretly(path: Path, write_photo: WritePhoto, seed: int) -> None:
    """Give a file other bytes of the same number, and its old time."""
    status = path.stat()
    assert write_photo(path, seed).stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def committed(images: Path, directory: Directory) -> Catalog:
    catalog, _ = extend_catalog(
        directory, scan(images), buckets=[Bucket(64, 64)], records_per_shard=4
    )
    return catalog


def test_a_known_file_that_looks_unchanged_is_not_read_again_unless_asked(
    images: Path, directory: Directory, write_photo: WritePhoto
) -> None:
    path = write_photo(images / "a.png", 0)
    os.utime(path, (LONG_AGO, LONG_AGO))
    old_id = image_id(path.read_bytes())
    catalog = committed(images, directory)
    replace_secretly(path, write_photo, 1)
    assert scan(images, catalog).images[0].image_id == old_id
    new_id = image_id(path.read_bytes())
    assert new_id != old_id
    assert scan(images, catalog, rescan=True).images[0].image_id == new_id


def test_a_file_as_young_as_the_last_scan_is_read_again(
    images: Path, directory: Directory, write_photo: WritePhoto
) -> None:
    path = write_photo(images / "a.png", 0)
    catalog = committed(images, directory)
    replace_secretly(path, write_photo, 1)
    assert scan(images, catalog).images[0].image_id == image_id(path.read_bytes())


@pytest.mark.parametrize("seconds", [LONG_AGO + 1, LONG_AGO - 86_400])
def test_a_file_with_another_time_is_read_again(
    images: Path, directory: Directory, write_photo: WritePhoto, seconds: int
) -> None:
    path = write_photo(images / "a.png", 0)
    os.utime(path, (LONG_AGO, LONG_AGO))
    catalog = committed(images, directory)
    write_photo(path, 1)
    os.utime(path, (seconds, seconds))
    assert scan(images, catalog).images[0].image_id == image_id(path.read_bytes())


def test_the_caption_of_a_known_file_is_read_anew(
    images: Path, directory: Directory, write_photo: WritePhoto
) -> None:
    path = write_photo(images / "a.png", 0, caption="before")
    os.utime(path, (LONG_AGO, LONG_AGO))
    catalog = committed(images, directory)
    path.with_suffix(".txt").write_text("after")
    assert captions(scan(images, catalog)) == {"a.png": "after"}
