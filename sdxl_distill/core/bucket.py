"""Aspect-ratio buckets: which (width, height) an image is trained at, and how it is cropped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple


class Bucket(NamedTuple):
    """One training resolution in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


# Podell et al. 2023 (SDXL), appendix I: 40 buckets of about one megapixel, as (height, width).
_SDXL_HEIGHT_WIDTH: Final = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664),
    (640, 1600), (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280),
    (832, 1216), (832, 1152), (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024),
    (1024, 960), (1088, 960), (1088, 896), (1152, 896), (1152, 832), (1216, 832), (1280, 768),
    (1344, 768), (1408, 704), (1472, 704), (1536, 640), (1600, 640), (1664, 576), (1728, 576),
    (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
)  # fmt: skip
SDXL_BUCKETS: Final = tuple(Bucket(width, height) for height, width in _SDXL_HEIGHT_WIDTH)


class CoverCrop(NamedTuple):
    """Resize to (resized_width, resized_height), then cut the bucket at (left, top); pixels."""

    resized_width: int
    resized_height: int
    left: int
    top: int


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """Return the bucket nearest to an image in log aspect ratio.

    Ties go to the bucket whose area is nearest to the image's, then to the wider one, so that
    the choice does not depend on the order of the list.
    """
    return _nearest(width, height, tuple(buckets))


# Cameras make millions of images in a handful of sizes.
@lru_cache(maxsize=1 << 16)
def _nearest(width: int, height: int, buckets: tuple[Bucket, ...]) -> Bucket:
    aspect = math.log(width / height)

    def distance(bucket: Bucket) -> tuple[float, float, int]:
        area_ratio = abs(math.log(bucket.width * bucket.height / (width * height)))
        difference = abs(math.log(bucket.width / bucket.height) - aspect)
        return round(difference, 12), round(area_ratio, 12), -bucket.width

    return min(buckets, key=distance)


def cover_crop(width: int, height: int, bucket: Bucket) -> CoverCrop:
    """Return the centre crop after the smallest uniform resize that covers the bucket.

    Integer arithmetic: the side that binds is met exactly, the other rounds to the nearest.
    """
    if width * bucket.height >= height * bucket.width:  # wider than the bucket: height binds
        resized_height = bucket.height
        resized_width = _scaled(width, bucket.height, height)
    else:
        resized_width = bucket.width
        resized_height = _scaled(height, bucket.width, width)
    return CoverCrop(
        resized_width,
        resized_height,
        (resized_width - bucket.width) // 2,
        (resized_height - bucket.height) // 2,
    )


def _scaled(length: int, numerator: int, denominator: int) -> int:
    return (2 * length * numerator + denominator) // (2 * denominator)
