"""Segments: rows round trip, bytes repeat, damage shows."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from sdxl_distill.catalog.segment import (
    SCHEMA,
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


def test_every_flipped_byte_of_a_segment_is_found() -> None:
    content = encode_segment(HEADER, [ROW])
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(CorruptError, match="catalog-000000"):
            decode_segment(bytes(damaged), segment_name(0))


def test_a_segment_of_version_1_is_read_and_no_flipped_byte_changes_it_silently() -> None:
    content = (Path(__file__).parent / "segment_of_version_1.parquet").read_bytes()
    expected = decode_segment(content, "x")
    assert expected.header.format_version == 1
    assert [row.captions for row in to_rows(expected.table)] == [
        ("caption 0",),
        ("caption 1",),
        ("caption 2",),
    ]
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        with suppress(CorruptError):
            segment = decode_segment(bytes(damaged), "x")
            assert segment.table.equals(expected.table)
            assert segment.header == expected.header
            assert segment.sha256 != expected.sha256


def test_a_segment_cannot_pass_for_one_of_the_version_without_digests() -> None:
    content = encode_segment(HEADER, [ROW]).replace(b'{"digest":"', b'{"digesT":"')
    with pytest.raises(CorruptError, match="without its digest"):
        decode_segment(content, "x")


HOSTILE_HEADERS: dict[str, Any] = {
    "deep": "[" * 100_000 + "]" * 100_000,
    "a list": [1],
    "a word for a time": {"scan_started_ns": "soon"},
    "NaN": {"scan_started_ns": math.nan},
    "infinity": {"scan_started_ns": math.inf},
    "a fraction": {"scan_started_ns": 1.5},
    "a time beyond 64 bits": {"scan_started_ns": 1 << 63},
    "a list for a time": {"scan_started_ns": [1]},
    "true for a number": {"n": True},
    "a negative number": {"n": -1},
    "null for a digest": {"predecessor_sha256": None},
    "a digest that is none": {"predecessor_sha256": "abc"},
    "no rows": {"num_rows": 0},
    "a word for rows": {"num_rows": "1"},
    "a word for a version": {"format_version": "1"},
    "version 0": {"format_version": 0},
    "another field": {"host": "a"},
}


@pytest.mark.parametrize("header", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS)
def test_a_header_with_other_values_is_corrupt(header: Any) -> None:
    text = header
    if not isinstance(header, str):
        fields = asdict(HEADER) | header if isinstance(header, dict) else header
        digest = hashlib.sha256(
            json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()
        text = json.dumps({"header": fields, "sha256": digest})
    file = BytesIO()
    with pq.ParquetWriter(file, SCHEMA, store_schema=False) as writer:
        writer.write_table(decode_segment(encode_segment(HEADER, [ROW]), "x").table)
        writer.add_key_value_metadata({"catalog": text})
    with pytest.raises(CorruptError, match="catalog-000000"):
        decode_segment(file.getvalue(), segment_name(0))


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
    content = encode_segment(replace(HEADER, format_version=3), [ROW])
    with pytest.raises(IncompatibleError, match="catalog format 3"):
        decode_segment(content, "x")


def test_names_and_numbers_belong_together() -> None:
    assert segment_number(segment_name(123)) == 123
    for other in ("catalog-1.parquet", ".tmp-0-1", "catalog-000001.parquet.tmp"):
        assert segment_number(other) is None


def test_rows_that_pyarrow_does_not_read_at_once_are_read_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> None:
        # What pyarrow raises where a column has more than 2 GiB of text.
        raise pa.ArrowNotImplementedError("Nested data conversions not implemented")

    content = (Path(__file__).parent / "segment_of_version_1.parquet").read_bytes()
    at_once = decode_segment(content, "segment").table
    monkeypatch.setattr(pq.ParquetFile, "read", refuse)
    assert decode_segment(content, "segment").table.equals(at_once)
