"""SDXL's micro-conditioning (Podell et al. 2023, §2.2) as one vector of six integers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sdxl_distill.core.bucket import Bucket, CoverCrop


def time_ids(
    original_width: int, original_height: int, crop: CoverCrop, bucket: Bucket
) -> npt.NDArray[np.int32]:
    """Return original h, w; crop top, left; target h, w as int32 [6], in SDXL's order.

    Args:
        original_width: width of the upright image (after EXIF rotation), pixels.
        original_height: its height, pixels.
        crop: the crop, whose `left` and `top` are in pixels of the resized image.
        bucket: the target size.
    """
    return np.array(
        [original_height, original_width, crop.top, crop.left, bucket.height, bucket.width],
        dtype=np.int32,
    )
