"""Names that appear once and whole, and the faults of the disk."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdxl_distill.errors import ConfigError, CorruptError, StorageError
from sdxl_distill.fsio import (
    Directory,
    LostDirectoryError,
    Publication,
    open_regular,
    read_bytes,
    storage_errors,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_name_has_one_content_for_ever(tmp_path: Path) -> None:
    with Directory(tmp_path) as first, Directory(tmp_path) as second:
        assert first.publish_bytes("shard.tar", b"mine")
        assert not second.publish_bytes("shard.tar", b"theirs")
    assert (tmp_path / "shard.tar").read_bytes() == b"mine"
    assert names(tmp_path) == ["shard.tar"]


@pytest.mark.parametrize("publication", [Publication.LINK, Publication.RENAME_NOREPLACE])
def test_exactly_one_of_many_racing_writers_wins(tmp_path: Path, publication: Publication) -> None:
    barrier = threading.Barrier(8)
    made: list[int] = []

    def write(number: int) -> None:
        with Directory(tmp_path) as directory:
            directory.publication = publication
            barrier.wait()
            if directory.publish_bytes("name", bytes([number])):
                made.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [bytes([number]) for number in made] == [(tmp_path / "name").read_bytes()]


def test_publishing_our_own_file_again_counts_as_made(tmp_path: Path) -> None:
    """A link retried over NFS reports that the name exists although it is ours."""
    with Directory(tmp_path) as directory, directory.stage() as staged:
        staged.file.write(b"content")
        assert directory.publish(staged, "name")
        assert directory.publish(staged, "name")


def test_an_unpublished_file_leaves_nothing(tmp_path: Path) -> None:
    with Directory(tmp_path) as directory, directory.stage() as staged:
        staged.file.write(b"half a record")
        assert names(tmp_path) == [staged.temporary_name]
    assert names(tmp_path) == []


def test_a_swept_temporary_file_is_lost_not_published(tmp_path: Path) -> None:
    with Directory(tmp_path) as directory, directory.stage() as staged:
        (tmp_path / staged.temporary_name).unlink()
        with pytest.raises(LostDirectoryError):
            directory.publish(staged, "name")
    assert names(tmp_path) == []


def test_a_handle_opened_before_a_withdrawal_writes_into_the_withdrawn_folder(
    tmp_path: Path,
) -> None:
    (tmp_path / "set").mkdir()
    with Directory(tmp_path / "set") as sleeper:
        (tmp_path / "set").rename(tmp_path / "withdrawn")
        (tmp_path / "set").mkdir()
        sleeper.publish_bytes("name", b"zombie")
    assert names(tmp_path / "set") == []
    assert names(tmp_path / "withdrawn") == ["name"]


def test_replacing_is_all_or_nothing_for_a_reader(tmp_path: Path) -> None:
    contents = {bytes([digit]) * 100_000 for digit in range(2)}
    stop = threading.Event()
    torn: list[bytes] = []

    def watch() -> None:
        while not stop.is_set():
            content = read_bytes(tmp_path / "name", 200_000)
            if content not in contents:
                torn.append(content)

    with Directory(tmp_path) as directory:
        directory.replace_bytes("name", bytes([0]) * 100_000)
        thread = threading.Thread(target=watch)
        thread.start()
        for turn in range(100):
            directory.replace_bytes("name", bytes([turn % 2]) * 100_000)
        stop.set()
        thread.join()
    assert torn == []


def test_of_many_swaps_at_once_none_is_lost(tmp_path: Path) -> None:
    with Directory(tmp_path) as directory, ThreadPoolExecutor(4) as pool:
        contents = [str(number).encode() for number in range(200)]
        returned = list(pool.map(lambda each: directory.swap_bytes("name", each, 9), contents))
    assert returned.count(None) == 1
    left = read_bytes(tmp_path / "name", 9)
    assert sorted([left, *(each for each in returned if each is not None)]) == sorted(contents)
    assert names(tmp_path) == ["name"]


def test_a_swap_without_exchange_replaces_and_returns_what_it_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdxl_distill.fsio._rename", lambda *_: False)
    with Directory(tmp_path) as directory:
        returned = [directory.swap_bytes("name", each, 9) for each in (b"first", b"second")]
    assert returned == [None, b"first"]
    assert read_bytes(tmp_path / "name", 9) == b"second"
    assert names(tmp_path) == ["name"]


def test_a_linked_file_is_told_from_another_of_the_same_name(tmp_path: Path) -> None:
    with (
        Directory(tmp_path / "source", create=True) as source,
        Directory(tmp_path / "target", create=True) as target,
    ):
        for name in ("own", "other"):
            source.publish_bytes(name, b"content")
        target.publish_bytes("other", b"content")
        assert [target.link_from(source, "own") for _ in range(2)] == [True, True]
        assert not target.link_from(source, "other")
        with pytest.raises(StorageError):
            target.link_from(source, "missing")
    assert (tmp_path / "source/own").samefile(tmp_path / "target/own")


def test_probe_finds_hard_links_and_leaves_nothing(tmp_path: Path) -> None:
    with Directory(tmp_path) as directory:
        directory.probe_publication()
        assert directory.publication is Publication.LINK
    assert names(tmp_path) == []


def test_probe_falls_back_when_links_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    with Directory(tmp_path) as directory:
        directory.probe_publication()
        assert directory.publication is Publication.RENAME_NOREPLACE
        assert directory.publish_bytes("name", b"first")
        assert not directory.publish_bytes("name", b"second")
    assert (tmp_path / "name").read_bytes() == b"first"


def test_a_file_system_without_create_only_names_needs_an_exclusive_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOTSUP, "not here")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("sdxl_distill.fsio._rename_noreplace", refuse)
    with Directory(tmp_path) as directory:
        with pytest.raises(StorageError, match=r"cache\.exclusive"):
            directory.probe_publication()
        directory.probe_publication(exclusive=True)
        assert directory.publish_bytes("name", b"content")
    assert names(tmp_path) == ["name"]


def test_a_fifo_is_refused_without_hanging(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "shard.tar")
    with pytest.raises(CorruptError, match="no regular file"):
        open_regular(tmp_path / "shard.tar")
    with pytest.raises(CorruptError, match="no regular file"):
        open_regular(tmp_path)


def test_size_is_bounded_before_reading(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptError, match="at most 1000 bytes"):
        read_bytes(tmp_path / "manifest.json", 1000)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.*no such folder"):
        Directory(tmp_path / "absent")


def test_a_file_in_place_of_a_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file stands where a folder should"):
        Directory(tmp_path / "file" / "set", create=True)


def test_a_full_disk_says_so() -> None:
    with (
        pytest.raises(StorageError, match="free some space"),
        storage_errors("/dev/full"),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        file.write(b"x")
