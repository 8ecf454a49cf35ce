from __future__ import annotations

import pytest
import torch
from support.photos import write_image

from sdxl_distill.catalog.catalog import Catalog
from sdxl_distill.catalog.growth import extend_catalog
from sdxl_distill.catalog.image import BadImageError
from sdxl_distill.catalog.image_folder import ImageFolder
from sdxl_distill.catalog.scan import scan_folder
from sdxl_distill.core.bucket import Bucket
from sdxl_distill.errors import StorageError
from sdxl_distill.sets.latents_content import ImageReader, LatentsContent, planned_shards
from sdxl_distill.shards.latents_plan import LatentsPlan
from sdxl_distill.storage.fsio import Directory

BUCKETS = (Bucket(128, 128), Bucket(160, 96))


@pytest.fixture
def images(tmp_path):
    for number in range(5):
        write_image(tmp_path / "images" / f"{number}.png", number, caption=f"{number}")
    return tmp_path / "images"


@pytest.fixture
def catalog(tmp_path, images):
    with Directory(tmp_path / "catalog", create=True) as directory:
        scan = scan_folder(images, Catalog(), max_pixels=10**6)
        return extend_catalog(directory, scan, buckets=BUCKETS, records_per_shard=3)[0]


def read_all(catalog, images, on_bad_image="skip", batch_size=2):
    reader = ImageReader(ImageFolder(images), 10**6, on_bad_image)
    plan = LatentsPlan(catalog)
    content = LatentsContent(plan, reader, torch.clone, batch_size, num_threads=2)
    return [batch for shard in planned_shards(plan) for batch in content.read(shard)]


def sources(batches):
    return [row.source for batch in batches for row in batch.rows]


def test_images_come_in_the_order_of_their_keys(catalog, images):
    shards = [catalog.rows(shard) for shard in catalog.shards]
    assert sources(read_all(catalog, images)) == [row.source for rows in shards for row in rows]


def test_batches_end_with_their_shard(catalog, images):
    assert [len(batch.rows) for batch in read_all(catalog, images)] == [2, 1, 2]


def test_an_image_replaced_since_the_scan_is_left_out(catalog, images, caplog):
    write_image(images / "2.png", 99)
    left = sources(read_all(catalog, images))
    assert sorted(left) == ["0.png", "1.png", "3.png", "4.png"]
    assert "2.png: changed since the scan" in caplog.text


def test_an_image_replaced_since_the_scan_is_an_error_when_so_configured(catalog, images):
    write_image(images / "2.png", 99)
    with pytest.raises(BadImageError, match=r"2\.png: changed since the scan"):
        read_all(catalog, images, on_bad_image="error")


def test_an_image_deleted_since_the_scan_is_left_out(catalog, images):
    (images / "0.png").unlink()
    assert "0.png" not in sources(read_all(catalog, images))


def test_an_image_that_became_a_folder_is_left_out(catalog, images):
    (images / "0.png").unlink()
    (images / "0.png").mkdir()
    assert "0.png" not in sources(read_all(catalog, images))


def test_a_folder_that_vanishes_is_a_fault_of_the_storage(catalog, images):
    reader = ImageReader(ImageFolder(images), 10**6, "skip")
    images.rename(images.with_name("aside"))
    images.mkdir()
    plan = LatentsPlan(catalog)
    content = LatentsContent(plan, reader, torch.clone, 2, num_threads=2)
    with pytest.raises(StorageError, match="not the one that was scanned"):
        list(content.read(planned_shards(plan)[0]))


def test_a_shard_of_which_no_image_is_there_is_never_committed(catalog, images):
    for row in catalog.rows(catalog.shards[0]):
        (images / row.source).unlink()
    plan = LatentsPlan(catalog)
    reader = ImageReader(ImageFolder(images), 10**6, "skip")
    content = LatentsContent(plan, reader, torch.clone, 2, num_threads=2)
    with pytest.raises(StorageError, match="none of the 3 images"):
        list(content.read(planned_shards(plan)[0]))
