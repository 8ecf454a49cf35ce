"""Names of shards: derived, parsed back, never ambiguous."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from sdxl_distill.core.image_id import image_id
from sdxl_distill.shards.shard_name import ShardName, is_bucket_side, is_safe_set_id

SIDES = st.integers(1, 1024).map(lambda eighth: 8 * eighth)
NAMES = st.builds(
    ShardName,
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
    SIDES,
    SIDES,
    st.integers(0, 999_999),
    st.integers(0, 1023),
)
IDENTITY = image_id(b"photo")


def test_a_shard_is_named_as_documented() -> None:
    assert ShardName("teacher_v1", 896, 1152, 7).tar == "teacher_v1-896x1152-000007.tar"
    assert ShardName("teacher_v1", 896, 1152, 7, 3).idx == "teacher_v1-896x1152-d3-000007.idx"


@given(NAMES)
def test_every_name_is_parsed_back(name: ShardName) -> None:
    assert ShardName.parse(name.tar, name.set_id) == name
    assert ShardName.parse(name.idx, name.set_id) == name


@given(NAMES, NAMES)
def test_no_two_shards_of_any_sets_share_a_file_name(left: ShardName, right: ShardName) -> None:
    assert (left.tar == right.tar) == (left == right)


@pytest.mark.parametrize(
    "filename",
    [
        "manifest.json",
        "a-64x64-000000.zip",
        "a-64x64-00000.tar",
        "a-64x64-0000000.tar",
        "a-064x64-000000.tar",
        "a-64x60-000000.tar",
        "a-64x8200-000000.tar",
        "a-64x64-d0-000000.tar",
        "a-64x64-d01-000000.tar",
        "a-64x64-d1024-000000.tar",
        "a-64x64-٠٠٠٠٠٠.tar",
        "b-64x64-000000.tar",
        ".tmp-a-64x64-000000.tar",
        "a-64x64-000000.tar\n",
    ],
)
def test_other_files_are_no_shard_of_the_set(filename: str) -> None:
    assert ShardName.parse(filename, "a") is None


@pytest.mark.parametrize("draw", [0, 3])
def test_members_are_named_as_the_loose_layout(draw: int) -> None:
    name = ShardName("a", 896, 1152, 7, draw)
    expected = f"{IDENTITY}_896x1152" + ("_d3" if draw else "")
    assert name.member_stem(IDENTITY) == expected
    assert name.parse_member(f"{expected}.json") == (IDENTITY, "json")
    assert name.key(IDENTITY) == f"{IDENTITY}_896x1152"


@pytest.mark.parametrize("stem", ["_64x128", "_64x64_d1", "_64x64_d02", "_064x64", ""])
def test_members_of_another_bucket_or_draw_are_refused(stem: str) -> None:
    assert ShardName("a", 64, 64, 0, 2).parse_member(f"{IDENTITY}{stem}.safetensors") is None


def test_shards_sort_by_bucket_number_and_draw() -> None:
    names = [ShardName("a", width, 64, number, draw)
             for width in (64, 128) for number in (0, 1, 10) for draw in (0, 1)]  # fmt: skip
    shuffled = [*names[5:], *names[:5]]
    assert sorted(shuffled) == names


@pytest.mark.parametrize("set_id", ["", ".", "..", "a/b", "-a", ".a", "a b", "a\n", "ä", "a" * 201])
def test_an_unsafe_set_id_is_recognised(set_id: str) -> None:
    assert not is_safe_set_id(set_id)
    assert is_safe_set_id("teacher_v1.2-b")


@pytest.mark.parametrize(
    ("length_px", "is_legal"),
    [(0, False), (-8, False), (4, False), (8, True), (60, False), (8192, True), (8200, False)],
)
def test_a_side_is_a_multiple_of_eight_of_at_most_8192_pixels(
    length_px: int, is_legal: bool
) -> None:
    assert is_bucket_side(length_px) == is_legal
