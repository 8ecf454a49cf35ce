"""SDXL's micro-conditioning (Podell et al. 2023, §2.2) as one vector of six integers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sdxl_distill.core.bucket import Bucket, CoverCrop


def time_ids(
    original_width: int, original_height: int, crop: CoverCrop, bucket: Bucket
) -> npt.NDArray[np.int32]:
    """Return original h, w; crop top, left; target h, w as int32 [6], the order SDXL knows.

    Args:
        original_width: of the upright image (after EXIF rotation), pixels.
        original_height: likewise.
        crop: its `left` and `top` are pixels of the resized image.
        bucket: the target size.
    """
    return np.array(
        [original_height, original_width, crop.top, crop.left, bucket.height, bucket.width],
        dtype=np.int32,
    )
