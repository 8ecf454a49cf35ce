from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from sdxl_distill.catalog.catalog import Catalog
from sdxl_distill.catalog.growth import extend_catalog
from sdxl_distill.catalog.image_folder import ImageFolder
from sdxl_distill.catalog.scan import Scan, scan_folder
from sdxl_distill.core.bucket import Bucket
from sdxl_distill.errors import ConfigError, StorageError
from sdxl_distill.storage.fsio import Directory


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    (tmp_path / "images" / "inner").mkdir(parents=True)
    return ImageFolder(tmp_path / "images")


def test_a_folder_that_is_the_same_is_there(folder: ImageFolder) -> None:
    folder.require_there("gone.png")
    folder.require_there("inner/gone.png")


def test_a_folder_that_is_gone_is_named(folder: ImageFolder) -> None:
    shutil.rmtree(folder.path)
    with pytest.raises(StorageError, match="images: the image folder is gone"):
        folder.require_there("a.png")


def test_an_empty_folder_in_its_place_is_another_one(folder: ImageFolder) -> None:
    folder.path.rename(folder.path.with_name("aside"))
    folder.path.mkdir()
    with pytest.raises(StorageError, match="not the one that was scanned"):
        folder.require_there("a.png")


def test_a_mount_point_below_that_is_not_mounted_here_is_named(folder: ImageFolder) -> None:
    with pytest.raises(StorageError, match="images/inner"):
        folder.watch(["inner"])


@pytest.fixture
def other_volume(folder: ImageFolder) -> Iterator[Path]:
    """An empty folder on another file system than the images', wherever there is one."""
    places = (Path(place) for place in ("/dev/shm", "/run", "/var/tmp", Path.home(), Path.cwd()))
    device = folder.path.stat().st_dev
    others = [place for place in places if place.is_dir() and place.stat().st_dev != device]
    assert others, "run with --basetemp on another file system than /dev/shm"
    with TemporaryDirectory(dir=others[0]) as path:
        yield Path(path)


def test_a_mount_below_concerns_its_own_images_only(
    folder: ImageFolder, other_volume: Path
) -> None:
    (folder.path / "mounted").symlink_to(other_volume)
    folder.watch(["mounted"])
    folder.require_there("mounted/a.png")
    (folder.path / "mounted").unlink()
    folder.require_there("b.png")
    with pytest.raises(StorageError, match="images/mounted"):
        folder.require_there("mounted/a.png")


def test_a_mount_below_is_one_mount_however_many_folders_it_has(
    folder: ImageFolder, other_volume: Path, write_photo
) -> None:
    write_photo(other_volume / "a" / "b" / "c.png", 1)
    (folder.path / "mounted").symlink_to(other_volume)
    scan = scan_folder(folder.path, Catalog(), max_pixels=10**6)
    assert scan.mounts == ("mounted",)
    assert "mounted/a/b/c.png" in [image.source for image in scan.images]


def catalog_of(tmp_path: Path, scan: Scan) -> Catalog:
    with Directory(tmp_path / "catalog", create=True) as directory:
        return extend_catalog(directory, scan, buckets=[Bucket(64, 64)], records_per_shard=3)[0]


@pytest.mark.parametrize("empty", [True, False])
def test_a_scan_of_a_folder_that_lost_all_images_is_a_fault_of_the_storage(
    tmp_path: Path, write_photo, empty: bool
) -> None:
    write_photo(tmp_path / "images" / "a.png", 1)
    catalog = catalog_of(tmp_path, scan_folder(tmp_path / "images", Catalog(), max_pixels=10**6))
    shutil.rmtree(tmp_path / "images")
    if empty:
        (tmp_path / "images").mkdir()
    with pytest.raises(StorageError, match="the catalog knows 1 images"):
        scan_folder(tmp_path / "images", catalog, max_pixels=10**6)
    with pytest.raises(ConfigError):
        scan_folder(tmp_path / "images", Catalog(), max_pixels=10**6)


def test_a_folder_that_vanishes_during_a_scan_is_no_folder_of_bad_images(
    tmp_path: Path, write_photo
) -> None:
    for number in range(2000):
        write_photo(tmp_path / "images" / f"{number:04}.png", number, 8, 8)

    def vanish(num_done: int, _num_files: int) -> None:
        if num_done == 1:
            (tmp_path / "images").rename(tmp_path / "aside")

    with pytest.raises(StorageError, match="the image folder is gone"):
        scan_folder(
            tmp_path / "images", Catalog(), max_pixels=10**6, progress=vanish, num_threads=1
        )
