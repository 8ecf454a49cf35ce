"""Names that appear once and whole, and the faults of the disk."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sdxl_distill.errors import ConfigError, CorruptError, StorageError
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.regular_file import (
    LostDirectoryError,
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
    monkeypatch.setattr("sdxl_distill.storage.fsio.exchange", lambda *_: False)
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


def test_a_fifo_is_refused_without_hanging(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "shard.tar")
    with pytest.raises(CorruptError, match="not a regular file"):
        open_regular(tmp_path / "shard.tar")
    with pytest.raises(CorruptError, match="not a regular file"):
        open_regular(tmp_path)


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket has 107 bytes at most
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("shard.tar")
        with pytest.raises(CorruptError, match="not a regular file"):
            open_regular(tmp_path / "shard.tar")


def test_size_is_bounded_before_reading(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptError, match="at most 1000 bytes"):
        read_bytes(tmp_path / "manifest.json", 1000)


def test_a_small_file_takes_no_more_memory_than_it_has(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"{}")
    tracemalloc.start()
    try:
        assert read_bytes(tmp_path / "manifest.json", 1 << 30) == b"{}"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_file_that_grows_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "caption.txt"
    path.write_bytes(b"half a")
    fstat = os.fstat

    def slow_fstat(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        with path.open("ab") as file:
            file.write(b" caption")
        return status

    monkeypatch.setattr(os, "fstat", slow_fstat)
    with pytest.raises(CorruptError, match="grew while it was being read"):
        read_bytes(path, 100)


class Stale:
    """Answers the first looks at a name as NFS does after another machine replaced the file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str, num_times: int) -> None:
        self.num_left = num_times
        original = getattr(os, call)

        def answer(*arguments: Any, **options: Any) -> Any:
            if self.num_left > 0:
                self.num_left -= 1
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return original(*arguments, **options)

        monkeypatch.setattr(os, call, answer)


@pytest.mark.parametrize("call", ["open", "fstat"])
def test_a_stale_file_is_read_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    (tmp_path / "name").write_bytes(b"content")
    with Directory(tmp_path) as directory:
        Stale(monkeypatch, call, 1)
        assert directory.read("name", 10) == b"content"
        Stale(monkeypatch, call, 1)
        directory.open("name").close()


@pytest.mark.parametrize("call", ["open", "fstat"])
def test_a_file_that_stays_stale_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    (tmp_path / "name").write_bytes(b"content")
    with Directory(tmp_path) as directory:
        for read in (partial(directory.read, "name", 10), partial(directory.open, "name")):
            stale = Stale(monkeypatch, call, 9)
            with pytest.raises(LostDirectoryError, match="removed while in use"):
                read()
            stale.num_left = 0


def test_many_threads_that_list_a_folder_all_see_every_name(tmp_path: Path) -> None:
    expected = {f"shard-{number:05d}" for number in range(3_000)}
    for name in expected:
        (tmp_path / name).touch()
    barrier = threading.Barrier(4)

    def look(_: int) -> bool:
        barrier.wait()
        return all(directory.names() == expected for _ in range(5))

    with Directory(tmp_path) as directory, ThreadPoolExecutor(4) as pool:
        assert all(pool.map(look, range(4)))


def test_a_removed_inner_folder_is_made_again_in_the_one_it_was_opened_in(tmp_path: Path) -> None:
    with (
        Directory(tmp_path / "set", create=True) as outer,
        outer.folder(".build") as build,
        build.folder("claims") as claims,
    ):
        (tmp_path / "set").rename(tmp_path / "withdrawn")
        (tmp_path / "set").mkdir()
        shutil.rmtree(tmp_path / "withdrawn/.build")
        with pytest.raises(LostDirectoryError):
            claims.publish_bytes("claim", b"mine")
        claims.make_again()
        assert claims.publish_bytes("claim", b"mine")
    assert names(tmp_path / "withdrawn/.build/claims") == ["claim"]
    assert names(tmp_path / "set") == []


def test_no_process_that_is_started_inherits_a_folder(tmp_path: Path) -> None:
    with Directory(tmp_path) as outer, outer.folder("inner") as inner:
        assert not os.get_inheritable(outer.descriptor)
        shutil.rmtree(tmp_path / "inner")
        inner.make_again()
        assert not os.get_inheritable(inner.descriptor)


def test_the_size_of_a_name_is_that_of_a_regular_file_or_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    with Directory(tmp_path) as directory:
        assert [directory.num_bytes(name) for name in ("file", "link", "absent")] == [5, 5, None]
        with pytest.raises(CorruptError, match="fifo: is not a regular file"):
            directory.num_bytes("fifo")


def test_a_name_that_was_given_new_content_has_another_version(tmp_path: Path) -> None:
    with Directory(tmp_path) as directory:
        assert directory.version("name") is None
        directory.replace_bytes("name", b"first")
        first = directory.version("name")
        assert first == directory.version("name")
        directory.replace_bytes("name", b"other")
        assert directory.version("name") not in (None, first)


def test_a_name_is_removed_and_who_comes_late_removes_nothing(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with Directory(tmp_path / "set") as directory:
        directory.publish_bytes("mine", b"")
        directory.publish_bytes("other", b"")
        for _ in range(2):
            directory.remove("mine")
            assert names(tmp_path / "set") == ["other"]
        shutil.rmtree(tmp_path / "set")
        directory.remove("other")


def test_a_file_is_rewritten_in_place(tmp_path: Path) -> None:
    with Directory(tmp_path, create=True) as directory:
        directory.publish_bytes("beat", b"first")
        file = (tmp_path / "beat").stat().st_ino
        assert directory.rewrite("beat", b"later")
        assert directory.read("beat", 9) == b"later"
        assert (tmp_path / "beat").stat().st_ino == file


def test_only_what_is_there_and_no_link_is_rewritten(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "foreign").write_bytes(b"theirs")
    (tmp_path / "set" / "link").symlink_to(tmp_path / "foreign")
    with Directory(tmp_path / "set") as directory:
        assert directory.rewrite("absent", b"mine") is False
        assert names(tmp_path / "set") == ["link"]
        with pytest.raises(StorageError, match="set"):
            directory.rewrite("link", b"mine!!")
        shutil.rmtree(tmp_path / "set")
        assert directory.rewrite("link", b"mine!!") is False
    assert (tmp_path / "foreign").read_bytes() == b"theirs"


@pytest.mark.parametrize(
    "act",
    [
        lambda directory, name: directory.folder(name),
        lambda directory, name: directory.publish_bytes(name, b""),
        lambda directory, name: directory.replace_bytes(name, b""),
        lambda directory, name: directory.swap_bytes(name, b"", 9),
        lambda directory, name: directory.link_from(directory, name),
        lambda directory, name: directory.copy_from(directory, name),
        lambda directory, name: directory.open(name),
        lambda directory, name: directory.num_bytes(name),
        lambda directory, name: directory.version(name),
        lambda directory, name: directory.read(name, 9),
        lambda directory, name: directory.rewrite(name, b""),
        lambda directory, name: directory.remove(name),
    ],
)
def test_no_path_leads_out_of_a_folder_that_is_held(tmp_path: Path, act) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "foreign").write_bytes(b"theirs")
    with Directory(tmp_path / "set") as directory, pytest.raises(AssertionError):
        act(directory, "../foreign")
    assert (tmp_path / "foreign").read_bytes() == b"theirs"
    assert names(tmp_path / "set") == []


def test_a_file_system_that_cannot_sync_folders_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def sync_files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_files_only)
    with Directory(tmp_path) as directory:
        assert directory.publish_bytes("name", b"content")
        directory.replace_bytes("name", b"other")


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
