from __future__ import annotations

from collections import Counter

import pytest
from PIL import Image

from sdxl_distill.demo.photos import BUCKETS, PHOTOS, Photo, write_photos
from sdxl_distill.errors import ConfigError


def _content(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_training_crops_are_96_and_spread_evenly_over_the_buckets(photo_folders):
    sizes = Counter()
    for path in photo_folders.train.rglob("*.jpg"):
        with Image.open(path) as image:
            sizes[image.size] += 1
    assert sizes == {tuple(bucket): 24 for bucket in BUCKETS}
    assert photo_folders.num_train == 96


def test_every_crop_has_a_caption_that_names_its_subject(photo_folders):
    subjects = {photo.name: photo.subject for photo in PHOTOS}
    images = [*photo_folders.train.rglob("*.jpg"), *photo_folders.held_out.rglob("*.jpg")]
    assert len(images) == photo_folders.num_train + photo_folders.num_held_out
    for path in images:
        assert subjects[path.name.split("-")[0]] in path.with_suffix(".txt").read_text()


def test_no_photo_is_both_trained_on_and_held_out(photo_folders):
    trained = {path.name.split("-")[0] for path in photo_folders.train.rglob("*.jpg")}
    held_out = {path.name.split("-")[0] for path in photo_folders.held_out.rglob("*.jpg")}
    assert trained and held_out
    assert not trained & held_out


def test_the_same_seed_writes_the_same_bytes(photo_folders, tmp_path):
    again = write_photos(tmp_path)
    assert _content(again.train) == _content(photo_folders.train)
    assert _content(again.held_out) == _content(photo_folders.held_out)


def test_another_seed_cuts_other_crops(photo_folders, tmp_path):
    other = _content(write_photos(tmp_path, seed=1).train)
    images = {name: content for name, content in other.items() if name.suffix == ".jpg"}
    first = _content(photo_folders.train)
    assert all(first[name] != content for name, content in images.items())


def test_a_package_that_is_not_installed_is_named():
    photo = Photo("no_such_package", "data/cat.png", "nature", "a cat")
    with pytest.raises(ConfigError, match=r"no_such_package.*cat"):
        photo.locate()
