"""Indices: exactly what the writer writes comes back, every other byte is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.shards.digest import tensor_digest
from sdxl_distill.shards.index import ShardIndex, is_strictly_ascending, tar_layout
from sdxl_distill.shards.index_layout import index_bytes
from sdxl_distill.shards.shard_name import ShardName


@pytest.fixture
def index(sets, ids) -> ShardIndex:
    small = sets.start("predictions", "compact")
    return small.add_shard(ShardName(small.identity.id, 64, 64, 0, 1), ids(3))


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize(("kind", "layout"), [("latents", "full"), ("predictions", "compact")])
def test_an_index_is_read_back(kind: str, layout: str, count: int, sets, ids) -> None:
    small = sets.start(kind, layout)
    written = small.add_shard(ShardName(small.identity.id, 64, 64, 0), ids(count))
    read = ShardIndex.from_bytes(written.to_bytes(), written.name)
    assert read.to_bytes() == written.to_bytes()
    assert read.header == written.header
    assert read.keys() == [f"{identity}_64x64" for identity in ids(count)]


@pytest.mark.parametrize("count", [0, 3])
def test_an_index_of_which_all_is_known_is_read_without_parsing(count: int, sets, ids) -> None:
    small = sets.start("predictions", "compact")
    written = small.add_shard(ShardName(small.identity.id, 64, 64, 0), ids(count))
    known = {
        "digest": written.digest,
        "num_records": count,
        "tar_bytes": written.tar_bytes,
        "tar_sha256": written.tar_sha256,
    }
    content = written.to_bytes()
    read = ShardIndex.from_known_bytes(content, written.name, written.header, **known)
    assert read is not None
    assert read.to_bytes() == content
    for name, value in (("num_records", count + 1), ("tar_sha256", "0" * 64)):
        other = {**known, name: value}
        assert ShardIndex.from_known_bytes(content, written.name, written.header, **other) is None


@pytest.mark.parametrize("layout", ["full", "compact"])
@pytest.mark.parametrize("num_digits", range(1, 17))
def test_the_size_of_an_index_is_known_beforehand(num_digits: int, layout: str, sets, ids) -> None:
    """A header ends on a multiple of eight: only sizes of all lengths show each byte of it."""
    small = sets.start("predictions", layout)
    index = small.add_shard(ShardName(small.identity.id, 64, 64, 0), ids(3))
    index = replace(index, tar_bytes=10 ** (num_digits - 1))
    header_bytes, num_tensors = len(index.header.content), index.digests.shape[1]
    has_noise = index.noise_digests is not None
    assert len(index.to_bytes()) == index_bytes(
        3, index.tar_bytes, header_bytes, num_tensors, has_noise=has_noise
    )


def test_every_flipped_byte_of_an_index_is_refused(index: ShardIndex) -> None:
    content = index.to_bytes()
    silent = []
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 0x01
        try:
            ShardIndex.from_bytes(bytes(flipped), index.name)
        except CorruptError:
            continue
        silent.append(position)
    assert silent == []


@pytest.mark.parametrize("num_bytes", [0, 7, 8, 100, -1])
def test_an_index_that_is_cut_is_refused(num_bytes: int, index: ShardIndex) -> None:
    with pytest.raises(CorruptError):
        ShardIndex.from_bytes(index.to_bytes()[:num_bytes], index.name)


def test_an_index_with_something_behind_it_is_refused(index: ShardIndex) -> None:
    with pytest.raises(CorruptError):
        ShardIndex.from_bytes(index.to_bytes() + b"\0", index.name)


LIES = {
    "unsorted keys": (lambda index: {"ids": index.ids[::-1].copy()}, "out of order"),
    "key twice": (lambda index: {"ids": np.repeat(index.ids[:1], 3, axis=0)}, "out of order"),
    "offset": (lambda index: {"offsets": index.offsets + 512}, "offsets"),
    "size": (lambda index: {"sizes": index.sizes - 1}, "offsets"),
    "tar bytes": (lambda index: {"tar_bytes": index.tar_bytes + 10_240}, "offsets"),
    "huge sidecar": (lambda index: {"sidecar_sizes": index.sizes + (1 << 40)}, "sidecar"),
    "negative sidecar": (lambda index: {"sidecar_sizes": -index.sizes}, "sidecar"),
    "digests of other tensors": (lambda index: {"digests": index.digests[:, 1:].copy()}, "digests"),
    "fewer rows": (lambda index: {"rest_digests": index.rest_digests[1:]}, "other tensors"),
}


@pytest.mark.parametrize(("change", "message"), LIES.values(), ids=LIES.keys())
def test_an_index_that_lies_with_a_right_digest_is_refused(
    change, message: str, index: ShardIndex
) -> None:
    lie = replace(index, **change(index))
    with pytest.raises(CorruptError, match=message):
        ShardIndex.from_bytes(lie.to_bytes(), index.name)


def test_an_index_of_a_newer_version_asks_for_a_newer_program(index: ShardIndex) -> None:
    newer = index.to_bytes().replace(b'"format_version":"1"', b'"format_version":"2"')
    with pytest.raises(IncompatibleError, match="format version 2"):
        ShardIndex.from_bytes(newer, index.name)


def test_a_count_of_millions_is_refused(index: ShardIndex) -> None:
    content = index.to_bytes().replace(b'"num_records":"3"', b'"num_records":"9"')
    with pytest.raises(CorruptError):
        ShardIndex.from_bytes(content, index.name)


def test_digests_find_equal_tensors_across_layouts(sets, ids) -> None:
    indices = []
    for layout in ("full", "compact"):
        small = sets.start(layout=layout, id=layout)
        indices.append(small.add_shard(ShardName(layout, 64, 64, 0), ids(3)))
    full, compact = indices
    for name in ("noise", "seed", "timestep", "resolution"):
        assert np.array_equal(full.tensor_digests(name), compact.tensor_digests(name))
    assert full.keys_digest == compact.keys_digest


def test_digests_are_those_of_the_tensors_written(sets, ids) -> None:
    small = sets.start()
    index = small.add_shard(ShardName(small.identity.id, 64, 128, 0), ids(2))
    for record in range(2):
        for name, tensor in small.written[index.name, record].items():
            assert index.tensor_digests(name)[record] == tensor_digest(tensor)


def test_an_unknown_tensor_is_a_key_error(index: ShardIndex) -> None:
    with pytest.raises(KeyError):
        index.tensor_digests("encoder_hidden_states")


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=6))
def test_the_order_of_ids_is_that_of_their_bytes(keys: list[bytes]) -> None:
    ids = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
    assert is_strictly_ascending(ids) == (keys == sorted(set(keys)))


def test_the_layout_follows_from_the_sizes_alone(sets, ids) -> None:
    small = sets.start("latents")
    index = small.add_shard(ShardName("latents", 64, 64, 0), ids(5))
    offsets, tar_bytes = tar_layout(index.header.record_bytes, index.sidecar_sizes)
    content = (small.directory / index.name.tar).read_bytes()
    assert tar_bytes == len(content)
    for record, offset in enumerate(offsets):
        assert content[offset:].startswith(index.header.content)
        sidecar = content[index.sidecar_offset(record) :][: index.sidecar_sizes[record]]
        assert sidecar == small.sidecar(ids(5)[record])
