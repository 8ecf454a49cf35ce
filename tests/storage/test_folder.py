"""One suite for the two ways to read a folder, by its name and by its handle; where they differ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sdxl_distill.errors import CorruptError
from sdxl_distill.storage.folder import Folder, FolderByPath
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.open_file import OPEN_FILES


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


@pytest.mark.parametrize("where", ["set s, file", None])
def test_later_messages_name_a_file_as_it_was_asked_for(
    where: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("file", "other"):
        (tmp_path / name).write_bytes(b"content")
    folder = FolderByPath(str(tmp_path))
    monkeypatch.setattr(OPEN_FILES, "_most_open", 1)
    opened, other = folder.open("file", where), folder.open("other")
    for _ in range(3):  # what was read lately stays open: here the other file
        other.read_into([memoryview(bytearray(1))], 0)
        folder.open("other")
    (tmp_path / "file").write_bytes(b"changed meanwhile")
    with pytest.raises(CorruptError, match=f"^{where or tmp_path / 'file'}: "):
        opened.read_into([memoryview(bytearray(1))], 0)


def test_a_folder_that_is_gone_has_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FolderByPath(str(tmp_path / "gone")).read("file", 9)
