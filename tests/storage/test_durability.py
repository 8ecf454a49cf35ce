"""A name appears only after its bytes are on the disk, and counts only after its folder is, too.

The calls are recorded as they are made: what a file held when it was synced, when its name
appeared, and which folder was synced afterwards. No test can cut the power.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_distill.errors import StorageError
from sdxl_distill.storage import fsio, publication
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.publication import Publication, Volume

Call = tuple[str, object]
WAYS = [Publication.LINK, Publication.RENAME_NOREPLACE, Publication.RENAME]
LARGE = bytes(range(256)) * 1000  # more than a buffer of Python's holds


class Recorder:
    """Keeps every call that makes bytes or names durable, in order, and lets it happen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Call] = []
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._sync)
        for owner, call, target in (
            (os, "link", 1),
            (os, "rename", 1),
            (publication, "_renameat2", 2),
        ):
            monkeypatch.setattr(owner, call, self._named(getattr(owner, call), target))

    def _sync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            self.calls.append(("folder synced", Path(f"/proc/self/fd/{descriptor}").readlink()))
        else:
            content = Path(f"/proc/self/fd/{descriptor}").read_bytes()
            self.calls.append(("file synced", content))

    def _named(self, original: Callable[..., Any], target: int) -> Callable[..., Any]:
        def record(*arguments: Any, **options: Any) -> Any:
            answer = original(*arguments, **options)
            self.calls.append(("named", arguments[target]))
            return answer

        return record


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def opened(path: Path, way: Publication = Publication.LINK) -> Directory:
    directory = Directory(path, create=True)
    directory.volume = Volume(publication=way)
    return directory


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("content", [b"content", LARGE], ids=["small", "large"])
def test_a_file_is_synced_before_it_is_named_and_its_folder_afterwards(
    tmp_path: Path, recorder: Recorder, way: Publication, content: bytes
) -> None:
    with opened(tmp_path, way) as directory:
        assert directory.publish_bytes("name", content)
    assert recorder.calls == [
        ("file synced", content),
        ("named", "name"),
        ("folder synced", tmp_path),
    ]


def test_the_first_publication_on_a_volume_syncs_in_the_same_order(
    tmp_path: Path, recorder: Recorder
) -> None:
    with Directory(tmp_path) as directory:
        assert directory.publish_bytes("name", b"content")
    assert recorder.calls[0] == ("file synced", b"content")
    assert recorder.calls[-2:] == [("named", "name"), ("folder synced", tmp_path)]


@pytest.mark.parametrize("way", WAYS)
def test_who_comes_second_syncs_the_folder_before_counting_on_the_name(
    tmp_path: Path, recorder: Recorder, way: Publication
) -> None:
    """The first writer may not have come to do so yet."""
    with opened(tmp_path, way) as directory:
        directory.publish_bytes("name", b"first")
        recorder.calls.clear()
        assert not directory.publish_bytes("name", b"second")
    assert recorder.calls == [("file synced", b"second"), ("folder synced", tmp_path)]


def test_a_replacement_is_synced_before_it_replaces_and_its_folder_afterwards(
    tmp_path: Path, recorder: Recorder
) -> None:
    with opened(tmp_path) as directory:
        directory.publish_bytes("name", b"old")
        recorder.calls.clear()
        directory.replace_bytes("name", LARGE)
    assert recorder.calls == [
        ("file synced", LARGE),
        ("named", "name"),
        ("folder synced", tmp_path),
    ]


@pytest.mark.parametrize("knows_exchange", [True, False])
def test_a_swap_is_synced_before_it_swaps_and_its_folder_afterwards(
    tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, knows_exchange: bool
) -> None:
    if not knows_exchange:
        monkeypatch.setattr(fsio, "exchange", lambda *_: False)
    with opened(tmp_path) as directory:
        assert directory.swap_bytes("name", b"old", 9) is None
        assert recorder.calls == [
            ("file synced", b"old"),
            ("named", "name"),
            ("folder synced", tmp_path),
        ]
        recorder.calls.clear()
        assert directory.swap_bytes("name", b"new", 9) == b"old"
    assert recorder.calls[0] == ("file synced", b"new")
    assert recorder.calls[-2:] == [("named", "name"), ("folder synced", tmp_path)]


def test_the_folder_of_a_linked_file_is_synced_after_the_link(
    tmp_path: Path, recorder: Recorder
) -> None:
    with opened(tmp_path / "source") as source, opened(tmp_path / "target") as target:
        source.publish_bytes("name", b"content")
        recorder.calls.clear()
        assert target.link_from(source, "name")
    assert recorder.calls == [("named", "name"), ("folder synced", tmp_path / "target")]


def test_a_copy_is_synced_before_it_is_compared_and_named_after_that(
    tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = fsio._same_content

    def compared(left: Any, right: Any) -> bool:
        recorder.calls.append(("compared", None))
        return compare(left, right)

    monkeypatch.setattr(fsio, "_same_content", compared)
    with opened(tmp_path / "source") as source, opened(tmp_path / "target") as target:
        source.publish_bytes("name", LARGE)
        recorder.calls.clear()
        assert target.copy_from(source, "name")
    assert recorder.calls == [
        ("file synced", LARGE),
        ("compared", None),
        ("file synced", LARGE),
        ("named", "name"),
        ("folder synced", tmp_path / "target"),
    ]


def test_a_disk_that_cannot_take_the_bytes_gives_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel could not write shows at the sync, after every write went well."""

    def refuse(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(tmp_path) as directory:
        directory.publish_bytes("there", b"old")
        monkeypatch.setattr(os, "fsync", refuse)
        for publish in (
            lambda: directory.publish_bytes("name", b"content"),
            lambda: directory.replace_bytes("there", b"content"),
            lambda: directory.swap_bytes("there", b"content", 9),
        ):
            with pytest.raises(StorageError):
                publish()
    assert {place.name: place.read_bytes() for place in tmp_path.iterdir()} == {"there": b"old"}


def test_a_folder_that_cannot_be_synced_for_a_fault_of_the_disk_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with opened(tmp_path) as directory:
        for publish in (directory.publish_bytes, directory.replace_bytes):
            with pytest.raises(StorageError):
                publish("name", b"content")
