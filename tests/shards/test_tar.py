"""The strict tar reader: tarfile is the oracle for good tars, every other byte is refused."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Sequence

import pytest
from support.memory_file import MemoryFile
from webdataset.writer import TarWriter

from sdxl_distill.errors import CorruptError
from sdxl_distill.shards.tar import (
    MODE,
    OWNER,
    TarMember,
    TarStream,
    member_header,
    read_at,
    read_members,
)

PAYLOADS = {"a.safetensors": b"\1" * 700, "a.json": b"{}", "b.safetensors": b"\2" * 512}


def written(**settings: object) -> bytes:
    stream = io.BytesIO()
    fixed = {"user": OWNER, "group": OWNER, "mode": MODE, "mtime": 0, "encoder": False}
    with TarWriter(stream, **{**fixed, **settings}) as tar:  # type: ignore[arg-type]
        for name, payload in PAYLOADS.items():
            stem, extension = name.split(".")
            tar.write({"__key__": stem, extension: payload})
    return stream.getvalue()


def members_of(content: bytes | bytearray) -> list[TarMember]:
    return list(read_members(MemoryFile(content), "x.tar"))


def test_members_are_those_that_tarfile_finds() -> None:
    content = written()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [TarMember(m.name, m.offset_data, m.size) for m in tar.getmembers()]
    assert members_of(content) == expected
    assert len(expected) == 3


def test_a_header_is_the_one_that_tarfile_writes() -> None:
    entry = tarfile.TarInfo("a_64x64.safetensors")
    entry.size, entry.mode, entry.mtime = 123_456_789, MODE, 0
    entry.uname = entry.gname = OWNER
    expected = entry.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    assert member_header("a_64x64.safetensors", 123_456_789) == expected


def test_an_empty_tar_has_no_members() -> None:
    assert members_of(bytes(10_240)) == []


def test_every_flipped_byte_outside_the_payloads_is_refused() -> None:
    content = written()
    inside = {
        position
        for member in members_of(content)
        for position in range(member.offset, member.offset + member.num_bytes)
    }
    silent = []
    for position in sorted(set(range(len(content))) - inside):
        flipped = bytearray(content)
        flipped[position] ^= 0x20
        try:
            members_of(flipped)
        except CorruptError:
            continue
        silent.append(position)
    assert silent == []


@pytest.mark.parametrize("num_bytes", [0, 1, 511, 512, 1024, 1100, 5120, 10_239])
def test_a_tar_that_is_cut_is_refused(num_bytes: int) -> None:
    with pytest.raises(CorruptError):
        members_of(written()[:num_bytes])


def test_a_tar_with_something_behind_it_is_refused() -> None:
    with pytest.raises(CorruptError, match="20480 bytes"):
        members_of(written() + bytes(10_240))


def test_pax_headers_are_refused() -> None:
    with pytest.raises(CorruptError, match="unexpected fields"):
        members_of(written(mtime=0.5, format="PAX_FORMAT"))


def test_a_negative_size_does_not_loop() -> None:
    content = bytearray(written())
    content[124:136] = b"\xff" * 10 + b"\xfe\x00"  # base-256 for -512
    with pytest.raises(CorruptError, match="not a tar header"):
        members_of(content)


def test_a_size_beyond_the_tar_is_refused() -> None:
    with pytest.raises(CorruptError, match="longer than the tar"):
        members_of(member_header("a.safetensors", 8 << 30 - 1) + bytes(9_728))


def test_a_compressed_tar_is_refused() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a"), io.BytesIO())
    with pytest.raises(CorruptError):
        members_of(stream.getvalue() + bytes(10_240))


def test_reading_past_the_end_says_at_which_byte() -> None:
    with pytest.raises(CorruptError, match="ends at byte 10"):
        read_at(MemoryFile(b"0123456789"), 8, 4, "x")


@pytest.mark.parametrize("size", [512, (2 << 20) - 1, 5 << 20])
@pytest.mark.parametrize("keeps", [True, False])
def test_one_pass_gives_every_payload_and_the_sha256(size: int, keeps: bool) -> None:
    payloads = {f"{number}.bin": os.urandom(size + number) for number in range(4)}
    buffer = io.BytesIO()
    with TarWriter(buffer, user=OWNER, group=OWNER, mode=MODE, mtime=0, encoder=False) as tar:
        for name, payload in payloads.items():
            tar.write({"__key__": name.removesuffix(".bin"), "bin": payload})
    content = buffer.getvalue()
    stream = TarStream(MemoryFile(content), "x.tar")
    waiting = None
    for member in stream.members():  # each payload is looked at when the next header was read
        if waiting is not None:
            assert stream.read(waiting.offset, waiting.num_bytes) == payloads[waiting.name]
            if not keeps:
                stream.forget(waiting.offset + waiting.num_bytes)
        waiting = member
    assert waiting is not None
    assert stream.read(waiting.offset, waiting.num_bytes) == payloads[waiting.name]
    assert stream.sha256() == hashlib.sha256(content).hexdigest()


class CountedFile(MemoryFile):
    """Notes what is read of it: offset and number of bytes."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.reads: list[tuple[int, int]] = []

    def read_into(self, buffers: Sequence[memoryview], offset: int, *, wait: bool = True) -> int:
        num_read = super().read_into(buffers, offset, wait=wait)
        self.reads.append((offset, num_read))
        return num_read


def test_a_stream_reads_each_byte_once() -> None:
    content = written()
    file = CountedFile(content)
    assert len(list(TarStream(file, "x.tar").members())) == len(PAYLOADS)
    assert file.reads == [(0, len(content))]
