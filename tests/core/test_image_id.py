"""Image ids and record keys."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from sdxl_distill.core.image_id import ids_digest, image_id, parse_record_key, record_key
from sdxl_distill.errors import CorruptError


def test_image_id_is_the_first_half_of_sha256() -> None:
    assert image_id(b"photo") == hashlib.sha256(b"photo").hexdigest()[:32]


def test_the_digest_of_ids_is_that_of_their_bytes_in_order() -> None:
    ids = np.arange(48, dtype=np.uint8).reshape(3, 16)
    assert ids_digest(ids) == hashlib.sha256(bytes(range(48))).hexdigest()
    assert ids_digest(ids[::2]) == hashlib.sha256(bytes([*range(16), *range(32, 48)])).hexdigest()


def test_key_round_trips() -> None:
    identity = image_id(b"photo")
    assert parse_record_key(record_key(identity, 896, 1152)) == (identity, 896, 1152)


@pytest.mark.parametrize(
    "key",
    ["", "abc_8x8", "../" + "0" * 32 + "_8x8", "0" * 32 + "_08x8", "F" * 32 + "_8x8",
     "0" * 32 + "_8x8\n", "0" * 32 + "_8x"],
)  # fmt: skip
def test_malformed_key_is_corrupt(key: str) -> None:
    with pytest.raises(CorruptError, match="hex digits"):
        parse_record_key(key)
