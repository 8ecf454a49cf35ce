from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdxl_distill.catalog.captions import CAPTION_FIELDS, read_metadata
from sdxl_distill.catalog.catalog import Catalog
from sdxl_distill.catalog.growth import extend_catalog, require_captions
from sdxl_distill.catalog.scan import Scan, ScannedImage, scan_folder
from sdxl_distill.core.bucket import Bucket
from sdxl_distill.errors import ConfigError
from sdxl_distill.storage.fsio import Directory


def scan_of(num_empty: int, num_captioned: int, first: int = 0) -> Scan:
    captions = [""] * num_empty + ["a fox"] * num_captioned
    images = (
        ScannedImage(f"{number:032x}", f"{number:03}.png", 100, 5, 50, 50, caption)
        for number, caption in enumerate(captions, start=first)
    )
    return Scan(Path("images"), 1, tuple(images), ())


@pytest.mark.parametrize(("num_empty", "num_captioned"), [(5, 0), (5, 4), (51, 49)])
def test_new_images_most_of_which_have_no_caption_are_refused(
    num_empty: int, num_captioned: int
) -> None:
    with pytest.raises(ConfigError, match=f"{num_empty} of .* have no caption: 000.png") as caught:
        require_captions(Catalog(), scan_of(num_empty, num_captioned))
    assert "data.allow_empty_captions" in str(caught.value)


@pytest.mark.parametrize(("num_empty", "num_captioned"), [(4, 0), (5, 5), (49, 51)])
def test_a_handful_or_a_minority_without_captions_is_not(
    num_empty: int, num_captioned: int
) -> None:
    require_captions(Catalog(), scan_of(num_empty, num_captioned))


def test_images_that_are_in_the_catalog_already_do_not_count(tmp_path: Path) -> None:
    with Directory(tmp_path) as directory:
        buckets = [Bucket(64, 64)]
        scan = scan_of(20, 0)
        catalog, _ = extend_catalog(directory, scan, buckets=buckets, records_per_shard=3)
    require_captions(catalog, scan)
    require_captions(catalog, scan_of(20, 3))
    with pytest.raises(ConfigError, match="20 of 20 new images"):
        require_captions(catalog, scan_of(20, 0, first=20))


@pytest.mark.parametrize("field", CAPTION_FIELDS)
def test_every_usual_name_of_a_caption_is_read(tmp_path: Path, field: str) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text(json.dumps({"file_name": "a.png", field: " a fox "}))
    assert read_metadata(path) == {"a.png": "a fox"}


def test_the_refusal_says_which_fields_the_metadata_has(tmp_path: Path, write_photo) -> None:
    lines = []
    for number in range(6):
        write_photo(tmp_path / f"{number}.png", number, 8, 8)
        lines.append(json.dumps({"file_name": f"{number}.png", "beschreibung": "x", "tags": []}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    scan = scan_folder(tmp_path, Catalog(), max_pixels=10**6)
    with pytest.raises(ConfigError, match=r"has the fields beschreibung, tags"):
        require_captions(Catalog(), scan)
