"""How a volume publishes is found at its first publication, whoever comes first."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import places
from support.places import Linkless, place_without_create_only_names, place_without_links

from sdxl_distill.errors import StorageError
from sdxl_distill.storage import publication
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.publication import Publication, Volume
from sdxl_distill.storage.regular_file import read_bytes


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test give back what a shim replaces."""
    monkeypatch.setattr(os, "link", os.link)
    monkeypatch.setattr(publication, "_renameat2", publication._renameat2)


def folder_of(place: Linkless) -> Path:
    """Make a folder in a place that has its limits from now on."""
    place.limits()
    folder = place.path / "folder"
    folder.mkdir()
    return folder


@pytest.fixture
def linkless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of a file system that does not link."""
    keep(monkeypatch)
    with place_without_links(tmp_path) as place:
        yield folder_of(place)


@pytest.fixture
def nameless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of a file system without create-only names."""
    keep(monkeypatch)
    with place_without_create_only_names(tmp_path) as place:
        yield folder_of(place)


def test_links_are_found_first_and_the_trial_leaves_nothing(tmp_path: Path) -> None:
    with Directory(tmp_path) as directory:
        assert directory.volume.publication is None
        assert directory.publish_bytes("name", b"content")
        assert directory.volume.publication is Publication.LINK
    assert names(tmp_path) == ["name"]


def test_where_links_are_refused_names_are_made_once_by_renaming(linkless: Path) -> None:
    with Directory(linkless) as first, Directory(linkless) as second:
        assert first.publish_bytes("name", b"first")
        assert first.volume.publication is Publication.RENAME_NOREPLACE
        assert not second.publish_bytes("name", b"second")
    assert read_bytes(linkless / "name", 9) == b"first"
    assert names(linkless) == ["name"]


@pytest.mark.parametrize(
    "number",
    [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EACCES,
     errno.EINVAL],
)  # fmt: skip
def test_whatever_a_place_says_to_a_link_the_next_way_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(number, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    with Directory(tmp_path) as directory:
        directory.publish_bytes("name", b"content")
        assert directory.volume.publication is Publication.RENAME_NOREPLACE


def test_a_full_disk_is_no_refusal_of_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "link", refuse)
    with Directory(tmp_path) as directory:
        with pytest.raises(StorageError, match="free some space"):
            directory.publish_bytes("name", b"content")
        assert directory.volume.publication is None
    assert names(tmp_path) == []


def test_a_link_that_replaces_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replacing(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        os.rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "link", replacing)
    with Directory(tmp_path) as directory:
        directory.publish_bytes("name", b"content")
        assert directory.volume.publication is Publication.RENAME_NOREPLACE


def test_a_rename_that_ignores_its_flag_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems take the flag and replace all the same."""

    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    def replacing(directory: int, source: str, target: str, _flag: int) -> None:
        os.rename(source, target, src_dir_fd=directory, dst_dir_fd=directory)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(publication, "_renameat2", replacing)
    with Directory(tmp_path) as directory, pytest.raises(StorageError, match=r"cache\.exclusive"):
        directory.publish_bytes("name", b"content")
    assert names(tmp_path) == []


def test_without_create_only_names_the_promise_of_one_worker_is_asked_for(nameless: Path) -> None:
    with Directory(nameless) as directory, pytest.raises(StorageError, match=r"cache\.exclusive"):
        directory.publish_bytes("name", b"content")
    assert names(nameless) == []


def test_nobody_is_taken_to_be_alone_unless_the_user_says_so(tmp_path: Path) -> None:
    assert not Volume().exclusive
    with Directory(tmp_path) as directory:
        assert not directory.volume.exclusive


def test_an_exclusive_worker_too_gives_a_name_one_content_for_ever(nameless: Path) -> None:
    with Directory(nameless, exclusive=True) as directory:
        assert directory.publish_bytes("name", b"first")
        assert directory.volume.publication is Publication.RENAME
        assert not directory.publish_bytes("name", b"second")
        assert directory.swap_bytes("name", b"third", 9) == b"first"
        directory.replace_bytes("name", b"fourth")
    assert read_bytes(nameless / "name", 9) == b"fourth"
    assert names(nameless) == ["name"]


def test_folders_in_a_folder_publish_as_it_does(nameless: Path) -> None:
    with Directory(nameless, exclusive=True) as directory, directory.folder("inner") as inner:
        assert inner.publish_bytes("name", b"content")
        assert directory.volume is inner.volume
    assert names(nameless / "inner") == ["name"]


def test_a_folder_on_another_file_system_is_another_volume(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    with Directory(tmp_path, exclusive=True) as directory:
        if other.is_dir() and other.stat().st_dev != tmp_path.stat().st_dev:
            (tmp_path / "inner").symlink_to(other)
        else:  # then the same file system answers for another
            directory.volume = Volume(exclusive=True, publication=Publication.RENAME)
            directory._device = lambda: -1
        with directory.folder("inner") as inner:
            assert inner.volume is not directory.volume
            assert inner.volume.exclusive


@pytest.mark.parametrize("way", [Publication.LINK, Publication.RENAME_NOREPLACE])
def test_exactly_one_of_many_racing_writers_wins(tmp_path: Path, way: Publication) -> None:
    barrier = threading.Barrier(8)
    made: list[int] = []

    def write(number: int) -> None:
        with Directory(tmp_path) as directory:
            directory.volume = Volume(publication=way)
            barrier.wait()
            if directory.publish_bytes("name", bytes([number])):
                made.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [bytes([number]) for number in made] == [(tmp_path / "name").read_bytes()]
    assert names(tmp_path) == ["name"]


@pytest.mark.parametrize("way", Publication)
def test_our_own_file_published_again_counts_as_made(tmp_path: Path, way: Publication) -> None:
    """A network may do it once more after its answer was lost."""
    with Directory(tmp_path) as directory, directory.stage() as staged:
        directory.volume = Volume(publication=way)
        staged.file.write(b"content")
        assert directory.publish(staged, "name")
        assert directory.publish(staged, "name")
    assert names(tmp_path) == ["name"]


@pytest.mark.parametrize("way", Publication)
def test_a_link_that_leads_to_our_own_file_is_not_its_name(
    tmp_path: Path, way: Publication
) -> None:
    with Directory(tmp_path) as directory, directory.stage() as staged:
        directory.volume = Volume(publication=way)
        (tmp_path / "name").symlink_to(staged.temporary_name)
        assert not directory.publish(staged, "name")
        assert (tmp_path / "name").is_symlink()


def test_a_copy_stands_in_for_a_refused_link(linkless: Path) -> None:
    with (
        Directory(linkless / "source", create=True) as source,
        Directory(linkless / "target", create=True) as target,
    ):
        source.publish_bytes("name", b"content")
        target.publish_bytes("other", b"mine")
        source.publish_bytes("other", b"theirs")
        assert not target.link_from(source, "name")
        assert target.copy_from(source, "name")
        assert not target.copy_from(source, "other")
    assert read_bytes(linkless / "target" / "name", 9) == b"content"
    assert read_bytes(linkless / "target" / "other", 9) == b"mine"
    assert names(linkless / "target") == ["name", "other"]


def test_the_shims_say_what_the_file_systems_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real exFAT, where it can be mounted, answers as its stand-in does."""
    keep(monkeypatch)
    answers: list[list[int]] = []
    (tmp_path / "real").mkdir()
    with place_without_create_only_names(tmp_path / "real") as place:
        answers.append(_answers(place.path))
    places.refuse_links_and_flags()
    (tmp_path / "shim").mkdir()
    answers.append(_answers(tmp_path / "shim"))
    if place.is_real:
        assert answers[0] == answers[1]
    assert answers[1] == [errno.EPERM, errno.EINVAL, errno.EEXIST, errno.EINVAL]


def _answers(folder: Path) -> list[int]:
    for name in ("left", "right"):
        (folder / name).touch()
    answers: list[int] = []
    with Directory(folder) as directory:
        descriptor = directory.descriptor
        attempts: list[Callable[[], object]] = [
            lambda: os.link("left", "new", src_dir_fd=descriptor, dst_dir_fd=descriptor),
            lambda: publication._renameat2(descriptor, "left", "new", 1),
            lambda: publication._renameat2(descriptor, "left", "right", 1),
            lambda: publication._renameat2(descriptor, "left", "right", 2),
        ]
        for attempt in attempts:
            try:
                attempt()
                answers.append(0)
            except OSError as error:
                answers.append(error.errno or 0)
    return answers
