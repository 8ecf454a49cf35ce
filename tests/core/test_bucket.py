"""Bucket choice and crop, against brute force and exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

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
