"""The index of a tar: a function of its bytes that no byte escapes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from support.memory_file import MemoryFile
from webdataset.writer import TarWriter

from sdxl_distill.errors import CorruptError
from sdxl_distill.shards import tar as tar_module
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.tar import MODE, OWNER
from sdxl_distill.shards.tar_index import header_of_tar, index_of_tar


class Tar(MemoryFile):
    """A tar in memory, with what its index is made of."""

    def __init__(self, content: bytes, name: ShardName, header: RecordHeader) -> None:
        super().__init__(content)
        self.name, self.header = name, header

    def index(self) -> ShardIndex:
        return index_of_tar(self, self.name, self.header)


@pytest.fixture
def make(sets, ids) -> Callable[..., tuple[Tar, bytes, ShardIndex]]:
    def build(kind: str, layout: str = "full", count: int = 2) -> tuple[Tar, bytes, ShardIndex]:
        small = sets.start(kind, layout)
        name = ShardName(small.identity.id, 64, 64, 0)
        index = small.add_shard(name, ids(count))
        content = (small.directory / name.tar).read_bytes()
        return Tar(content, name, small.header(name)), content, index

    return build


@pytest.mark.parametrize(("kind", "layout"), [("latents", "full"), ("predictions", "compact")])
def test_no_flipped_byte_of_a_tar_gives_the_same_index(kind: str, layout: str, make) -> None:
    tar, content, index = make(kind, layout)
    silent = []
    for position in range(0, len(content), 3):
        os.pwrite(tar.descriptor, bytes([content[position] ^ 0x04]), position)
        try:
            if tar.index().digest == index.digest:
                silent.append(position)
        except CorruptError:
            pass
        os.pwrite(tar.descriptor, content[position : position + 1], position)
    assert silent == []
    assert tar.index().digest == index.digest


def test_a_tar_of_another_set_or_source_is_refused(make) -> None:
    tar, _, _ = make("predictions")
    tar.header = replace(tar.header, content=tar.header.content.replace(b"5555", b"6666"))
    with pytest.raises(CorruptError, match="another header"):
        tar.index()


def test_a_tar_under_the_name_of_another_bucket_or_draw_is_refused(make) -> None:
    tar, _, _ = make("predictions")
    for change in ({"width": 128}, {"draw": 1}):
        tar.name = replace(tar.name, **change)
        with pytest.raises(CorruptError, match="another bucket"):
            tar.index()


def test_the_header_of_a_tar_is_that_of_its_records(make) -> None:
    tar, _, index = make("latents")
    assert header_of_tar(tar, tar.name) == index.header


def test_an_empty_tar_has_no_header(make) -> None:
    tar, _, _ = make("latents", count=0)
    assert header_of_tar(tar, tar.name) is None


def test_a_tar_of_more_than_two_gigabytes_is_refused_unread(make) -> None:
    tar, _, _ = make("latents")
    os.ftruncate(tar.descriptor, (2 << 30) + 1)
    with pytest.raises(CorruptError, match="at most"):
        tar.index()


def packed(members: list[tuple[str, str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with TarWriter(stream, user=OWNER, group=OWNER, mode=MODE, mtime=0, encoder=False) as tar:
        for stem, extension, payload in members:
            tar.write({"__key__": stem, extension: payload})
    return stream.getvalue()


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["json", "record"], "without its record"),
        (["record", "json", "json"], "without its record"),
        (["record", "empty"], "1 to"),
        (["record", "stranger"], "another bucket"),
        (["short"], "bytes"),
    ],
    ids=str,
)
def test_members_in_another_order_or_size_are_refused(order, message: str, make, ids) -> None:
    tar, _, _ = make("latents")
    stem = tar.name.member_stem(ids(1)[0])
    record = tar.header.content + bytes(tar.header.record_bytes - len(tar.header.content))
    members = {
        "json": (stem, "json", b"{}"),
        "empty": (stem, "json", b""),
        "record": (stem, "safetensors", record),
        "short": (stem, "safetensors", record[:-1]),
        "stranger": ("a", "txt", b"hello"),
    }
    made = Tar(packed([members[part] for part in order]), tar.name, tar.header)
    with pytest.raises(CorruptError, match=message):
        made.index()


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_a_seed_that_is_none_is_refused(seed: int, make, ids) -> None:
    tar, _, _ = make("predictions", "compact")
    tensors = {
        "teacher_pred": np.zeros((4, 8, 8), np.float16),
        "timestep": np.zeros(1, np.int64),
        "resolution": np.zeros(2, np.int32),
        "seed": np.array([seed]),
    }
    record = tar.header.encode(tensors)
    content = packed([(tar.name.member_stem(ids(1)[0]), "safetensors", record)])
    with pytest.raises(CorruptError, match="32 bits"):
        Tar(content, tar.name, tar.header).index()


@pytest.mark.parametrize("piece_bytes", range(7680, 9216, 64))
def test_the_index_is_the_same_wherever_the_pieces_that_are_read_end(
    piece_bytes: int, make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_module, "_PIECE_BYTES", piece_bytes)
    tar, _, index = make("latents", count=20)
    assert tar.index().digest == index.digest
