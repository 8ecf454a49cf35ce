"""Bucket choice and crop, against brute force and exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, strategies as st

from sdxl_distill.core.bucket import SDXL_BUCKETS, Bucket, cover_crop, nearest_bucket

SIDE = st.integers(16, 12_000)


def test_sdxl_buckets_are_forty_of_about_a_megapixel() -> None:
    assert len(set(SDXL_BUCKETS)) == 40
    assert all(side % 64 == 0 for bucket in SDXL_BUCKETS for side in bucket)
    assert all(0.9 < b.width * b.height / 1024**2 <= 1.0 for b in SDXL_BUCKETS)
    aspects = sorted(b.width / b.height for b in SDXL_BUCKETS)
    assert (aspects[0], aspects[-1]) == (0.25, 4)


@given(width=SIDE, height=SIDE)
def test_nearest_bucket_minimises_log_aspect_distance(width: int, height: int) -> None:
    chosen = nearest_bucket(width, height, SDXL_BUCKETS)
    aspect = math.log(width / height)
    best = min(abs(math.log(b.width / b.height) - aspect) for b in SDXL_BUCKETS)
    assert abs(math.log(chosen.width / chosen.height) - aspect) <= best + 1e-9
    assert nearest_bucket(width, height, SDXL_BUCKETS[::-1]) == chosen


@given(width=SIDE, height=SIDE, bucket=st.sampled_from(SDXL_BUCKETS))
def test_crop_covers_and_never_stretches(width: int, height: int, bucket: Bucket) -> None:
    crop = cover_crop(width, height, bucket)
    scale = max(Fraction(bucket.width, width), Fraction(bucket.height, height))
    assert abs(crop.resized_width - scale * width) <= Fraction(1, 2)
    assert abs(crop.resized_height - scale * height) <= Fraction(1, 2)
    assert 0 <= crop.left <= crop.resized_width - bucket.width
    assert 0 <= crop.top <= crop.resized_height - bucket.height
    assert bucket.width == crop.resized_width or bucket.height == crop.resized_height


@given(width=SIDE, height=SIDE, bucket=st.sampled_from(SDXL_BUCKETS))
def test_what_is_cut_off_is_the_same_on_both_sides(width: int, height: int, bucket: Bucket) -> None:
    crop = cover_crop(width, height, bucket)
    right = crop.resized_width - bucket.width - crop.left
    bottom = crop.resized_height - bucket.height - crop.top
    assert right - crop.left in (0, 1)
    assert bottom - crop.top in (0, 1)


@pytest.mark.parametrize(("side", "nearest"), [(70, 64), (120, 128), (900, 512)])
def test_of_buckets_of_one_shape_the_nearest_in_area_is_chosen(side: int, nearest: int) -> None:
    buckets = [Bucket(64, 64), Bucket(128, 128), Bucket(512, 512)]
    assert nearest_bucket(side, side, buckets) == (nearest, nearest)


def test_of_two_buckets_that_are_equally_near_the_wider_one_is_chosen() -> None:
    upright, lying = Bucket(64, 256), Bucket(256, 64)
    assert nearest_bucket(128, 128, [upright, lying]) == lying
    assert nearest_bucket(128, 128, [lying, upright]) == lying


def test_a_bucket_is_named_by_width_and_height() -> None:
    assert str(Bucket(896, 1152)) == "896x1152"
