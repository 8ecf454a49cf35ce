"""Segments: rows round trip, bytes repeat, damage shows."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from io import BytesIO

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from sdxl_distill.catalog.segment import (
    CatalogRow,
    SegmentHeader,
    decode_segment,
    encode_segment,
    segment_name,
    segment_number,
    to_rows,
)
from sdxl_distill.core.bucket import Bucket, CoverCrop
from sdxl_distill.errors import CorruptError, IncompatibleError

ROW = CatalogRow(
    image_id="0123456789abcdef" * 2,
    source="photos/été.png",
    num_bytes=1234,
    mtime_ns=1_700_000_000_123_456_789,
    width=100,
    height=50,
    bucket=Bucket(64, 64),
    crop=CoverCrop(128, 64, 32, 0),
    captions=("a fox",),
    shard=3,
)
HEADER = SegmentHeader(n=0, predecessor_sha256="", scan_started_ns=1_700_000_001, num_rows=1)

sizes = st.integers(1, 2**31 - 1)
rows = st.builds(
    CatalogRow,
    image_id=st.text("0123456789abcdef", min_size=32, max_size=32),
    source=st.text(),
    num_bytes=st.integers(0, 2**40),
    mtime_ns=st.integers(-(2**62), 2**62),
    width=sizes,
    height=sizes,
    bucket=st.builds(Bucket, sizes, sizes),
    crop=st.builds(CoverCrop, sizes, sizes, sizes, sizes),
    captions=st.lists(st.text(), min_size=1, max_size=3).map(tuple),
    shard=st.integers(0, 2**31 - 1),
)


@settings(max_examples=50, deadline=None)
@given(table=st.lists(rows, min_size=1, max_size=5))
def test_rows_and_header_come_back(table: list[CatalogRow]) -> None:
    header = replace(HEADER, num_rows=len(table))
    segment = decode_segment(encode_segment(header, table), "x")
    assert to_rows(segment.table) == table
    assert segment.header == header


def test_equal_rows_give_equal_bytes() -> None:
    assert encode_segment(HEADER, [ROW]) == encode_segment(HEADER, [replace(ROW)])


def test_a_segment_knows_the_sha256_of_its_bytes() -> None:
    content = encode_segment(HEADER, [ROW])
    assert decode_segment(content, "x").sha256 == hashlib.sha256(content).hexdigest()


def test_any_parquet_reader_sees_key_parts_subset_and_caption_digest() -> None:
    row = pq.read_table(BytesIO(encode_segment(HEADER, [ROW]))).to_pylist()[0]
    assert (row["image_id"], row["bucket_width"], row["shard"]) == (ROW.image_id, 64, 3)
    assert row["subset"] == "photos"
    assert row["captions_sha256"] == hashlib.sha256(b'["a fox"]').hexdigest()
    assert ROW.key == f"{ROW.image_id}_64x64"


def test_no_flipped_byte_changes_a_segment_silently() -> None:
    content = encode_segment(HEADER, [ROW])
    expected = decode_segment(content, "x")
    num_found = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        try:
            segment = decode_segment(bytes(damaged), "x")
        except CorruptError:
            num_found += 1
        else:
            assert segment.table.equals(expected.table)
            assert segment.header == expected.header
            assert segment.sha256 != expected.sha256
    assert num_found > len(content) // 2


@pytest.mark.parametrize("size", [0, 3, 100, -1, -8])
def test_a_segment_cut_short_is_corrupt(size: int) -> None:
    with pytest.raises(CorruptError, match="catalog-000000"):
        decode_segment(encode_segment(HEADER, [ROW])[:size], segment_name(0))


def test_another_parquet_file_is_no_segment() -> None:
    file = BytesIO()
    pq.write_table(decode_segment(encode_segment(HEADER, [ROW]), "x").table, file)
    with pytest.raises(CorruptError, match="no catalog header"):
        decode_segment(file.getvalue(), "x")


def test_a_later_format_is_refused_as_such() -> None:
    content = encode_segment(replace(HEADER, format_version=2), [ROW])
    with pytest.raises(IncompatibleError, match="catalog format 2"):
        decode_segment(content, "x")


def test_names_and_numbers_belong_together() -> None:
    assert segment_number(segment_name(123)) == 123
    for other in ("catalog-1.parquet", ".tmp-0-1", "catalog-000001.parquet.tmp"):
        assert segment_number(other) is None
