"""One suite for the two ways to read a folder, by its name and by its handle; where they differ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sdxl_distill.errors import CorruptError
from sdxl_distill.storage.folder import Folder, FolderByPath
from sdxl_distill.storage.fsio import Directory


@pytest.fixture(params=["path", "handle"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "file").write_bytes(b"content")
    if request.param == "path":
        yield FolderByPath(str(tmp_path / "set"))
    else:
        with Directory(tmp_path / "set") as directory:
            yield directory


def test_messages_name_the_folder_and_the_file_in_it(folder: Folder, tmp_path: Path) -> None:
    assert folder.where() == str(tmp_path / "set")
    assert folder.where("file") == str(tmp_path / "set" / "file")


def test_a_file_is_read_whole_within_its_bound(folder: Folder) -> None:
    assert folder.read("file", 7) == b"content"
    with pytest.raises(CorruptError, match="at most 6 bytes"):
        folder.read("file", 6)


def test_what_is_not_there_is_a_file_not_found(folder: Folder) -> None:
    with pytest.raises(FileNotFoundError):
        folder.read("absent", 9)
    with pytest.raises(FileNotFoundError):
        folder.open("absent")


def test_an_open_file_is_read_by_position(folder: Folder) -> None:
    buffer = bytearray(4)
    opened = folder.open("file", "set s, file")
    assert opened.num_bytes == 7
    assert opened.read_into([memoryview(buffer)], 3) == 4
    assert buffer == b"tent"


def test_by_its_name_the_folder_of_today_is_read_and_by_its_handle_the_one_of_then(
    tmp_path: Path,
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "file").write_bytes(b"old")
    with Directory(tmp_path / "set") as held:
        (tmp_path / "set").rename(tmp_path / "withdrawn")
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "file").write_bytes(b"new")
        assert held.read("file", 9) == b"old"
        assert FolderByPath(str(tmp_path / "set")).read("file", 9) == b"new"


def test_a_folder_that_is_gone_has_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FolderByPath(str(tmp_path / "gone")).read("file", 9)
