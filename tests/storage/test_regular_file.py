"""What is refused in place of a regular file leaves no descriptor open and says what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from sdxl_distill.errors import CorruptError, StorageError
from sdxl_distill.storage.regular_file import (
    LostDirectoryError,
    in_use,
    open_regular,
    read_bytes,
    storage_errors,
)


def open_descriptors() -> set[str]:
    return {each.name for each in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("read", [open_regular, lambda path: read_bytes(path, 9)])
def test_what_is_no_regular_file_is_closed_again(read, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    before = open_descriptors()
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(CorruptError, match=f"^{path}: .*; expected a regular file\n.*remove"):
            read(path)
    assert open_descriptors() == before


def test_a_file_that_cannot_be_examined_is_closed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    before = open_descriptors()

    def refuse(_descriptor: int) -> NoReturn:
        raise OSError(errno.EIO, "the disk is broken")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", refuse)
        with pytest.raises(StorageError, match="check the disk"):
            open_regular(tmp_path / "file")
    assert open_descriptors() == before


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE])
def test_what_vanishes_while_in_use_is_lost_and_to_be_looked_for_again(number: int) -> None:
    with pytest.raises(LostDirectoryError, match="^there: .*\n.*run again"), in_use("there"):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("number", "action"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "choose a folder"),
        (errno.EACCES, "let this user read and write"),
        (errno.ENOENT, "check the path"),
        (errno.ENOTDIR, "a file stands where a folder should"),
        (errno.ELOOP, "leads back to itself"),
        (errno.EIO, "check the disk or the mount"),
    ],
)
def test_each_refusal_says_what_to_do(number: int, action: str) -> None:
    reason = os.strerror(number)
    refused = pytest.raises(StorageError, match=f"^there: {reason}\n.*{action}")
    with refused as caught, storage_errors("there"):
        raise OSError(number, reason)
    assert not isinstance(caught.value, LostDirectoryError)


def test_a_refusal_without_a_number_says_its_own_words() -> None:
    with pytest.raises(StorageError, match="there: it went wrong"), storage_errors("there"):
        raise OSError("it went wrong")
