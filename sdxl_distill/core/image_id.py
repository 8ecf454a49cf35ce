"""Identity of an image and the key of its records: a function of the file's bytes alone."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import numpy.typing as npt

from sdxl_distill.errors import CorruptError

IMAGE_ID_DIGITS = 32
_KEY = re.compile(r"([0-9a-f]{32})_([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


def image_id(content: bytes) -> str:
    """Return the first 32 hex digits of the SHA-256 of an image file's bytes."""
    return hashlib.sha256(content).hexdigest()[:IMAGE_ID_DIGITS]


def ids_digest(ids: npt.NDArray[np.uint8]) -> str:
    """Return the SHA-256 of image ids, uint8 [n, 16], one after the other: 64 hex digits."""
    return hashlib.sha256(ids.tobytes()).hexdigest()


def record_key(image_id: str, width: int, height: int) -> str:
    """Return the key `{image_id}_{W}x{H}` that an image's records share in all sets."""
    return f"{image_id}_{width}x{height}"


def parse_record_key(key: str) -> tuple[str, int, int]:
    """Split a key into image id, width and height in pixels.

    Raises:
        CorruptError: when it does not have that form.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        raise CorruptError(f"key {key[:80]!r}", expected="{32 hex digits}_{W}x{H}")
    return match[1], int(match[2]), int(match[3])
