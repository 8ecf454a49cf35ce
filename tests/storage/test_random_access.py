"""One suite for everything that is read by position: descriptors, paths, files in the making."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdxl_distill.storage.folder import FolderByPath
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.random_access import Descriptor, RandomAccess

CONTENT = bytes(range(256)) * 40


@pytest.fixture(params=["descriptor", "handle", "path", "staged"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RandomAccess]:
    (tmp_path / "file").write_bytes(CONTENT)
    with Directory(tmp_path) as directory, directory.stage() as staged:
        staged.file.write(CONTENT)
        staged.file.flush()
        if request.param == "descriptor":
            with Descriptor(os.open(tmp_path / "file", os.O_RDONLY)) as opened:
                yield opened
        elif request.param == "handle":
            with directory.open("file") as opened:
                yield opened
        elif request.param == "path":
            yield FolderByPath(str(tmp_path)).open("file")
        else:
            yield staged


def test_its_size_is_that_of_the_file(source: RandomAccess) -> None:
    assert source.num_bytes == len(CONTENT)


@pytest.mark.parametrize("wait", [True, False])
def test_buffers_are_filled_one_after_the_other_from_a_position(
    source: RandomAccess, wait: bool
) -> None:
    first, second = bytearray(3), bytearray(500)
    source.prefetch(7, 503)
    num_bytes = source.read_into([memoryview(first), memoryview(second)], 7, wait=wait)
    # Without waiting, only what is in memory comes; what comes is right.
    assert num_bytes == 503 or not wait
    assert (first + second)[:num_bytes] == CONTENT[7 : 7 + num_bytes]


def test_at_the_end_there_is_less_and_behind_it_nothing(source: RandomAccess) -> None:
    buffer = bytearray(100)
    assert source.read_into([memoryview(buffer)], len(CONTENT) - 10) == 10
    assert buffer[:10] == CONTENT[-10:]
    assert source.read_into([memoryview(buffer)], len(CONTENT)) == 0


def test_who_does_not_want_to_wait_asks_the_kernel_so(
    source: RandomAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: list[int] = []
    preadv = os.preadv

    def record(descriptor: int, buffers: list[memoryview], offset: int, flag: int) -> int:
        flags.append(flag)
        return preadv(descriptor, buffers, offset, flag)

    monkeypatch.setattr(os, "preadv", record)
    for wait in (True, False):
        source.read_into([memoryview(bytearray(1))], 0, wait=wait)
    source.read_into([memoryview(bytearray(1))], 0)
    assert flags == [0, os.RWF_NOWAIT, 0]


def test_a_descriptor_is_closed_once_by_its_context(tmp_path: Path) -> None:
    number = os.open(tmp_path, os.O_RDONLY)
    with Descriptor(number) as opened:
        os.fstat(number)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    opened.close()  # would close what has the number now, were it not done once


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_a_file_in_the_making_has_the_mode_of_new_files(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with Directory(tmp_path) as directory:
            directory.publish_bytes("file", CONTENT)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
