"""The strict tar reader: tarfile is the oracle for good tars, every other byte is refused."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from webdataset.writer import TarWriter

from sdxl_distill.errors import CorruptError
from sdxl_distill.shards.tar import (
    MODE,
    OWNER,
    TarMember,
    member_header,
    read_at,
    read_members,
    sha256_of,
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
    descriptor = os.memfd_create("x.tar")
    try:
        os.write(descriptor, content)
        return list(read_members(descriptor, len(content), "x.tar"))
    finally:
        os.close(descriptor)


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
    with pytest.raises(CorruptError, match="no tar header"):
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


def test_reading_past_the_end_says_at_which_byte(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    with (tmp_path / "x").open("rb") as file, pytest.raises(CorruptError, match="ends at byte 10"):
        read_at(file.fileno(), memoryview(bytearray(8)), 4, "x")


def test_sha256_covers_exactly_the_named_bytes(tmp_path: Path) -> None:
    import hashlib

    content = os.urandom(3 << 20 | 17)
    (tmp_path / "x").write_bytes(content)
    with (tmp_path / "x").open("rb") as file:
        digest = sha256_of(file.fileno(), len(content) - 5, "x")
    assert digest == hashlib.sha256(content[:-5]).hexdigest()
