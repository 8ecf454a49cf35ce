"""Repairs where files cannot be linked, by whichever user, and those that fail beforehand."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.places import (
    another_user,
    place_without_create_only_names,
    place_without_links,
    refuse_links,
)
from support.toy_set import ToyContent, build, planned, toy_record

from sdxl_distill.builder.repair import RepairSummary, repair_set
from sdxl_distill.builder.withdrawal import folders_aside, withdraw_set
from sdxl_distill.errors import ConfigError, StorageError
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.storage import publication
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.location import Location
from sdxl_distill.storage.staged_file import StagedFile

NAMES = [shard.name for shard in planned(3)]


@pytest.fixture(autouse=True)
def unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives back what a shim replaces."""
    monkeypatch.setattr(os, "link", os.link)
    monkeypatch.setattr(publication, "_renameat2", publication._renameat2)


@pytest.fixture
def path() -> Iterator[Path]:
    """Folder of a set of three shards, the first one damaged, that every user can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield damaged_set(folder / "toy")
    shutil.rmtree(folder)


def damaged_set(path: Path, *, exclusive: bool = False) -> Path:
    build(path, 3, ToyContent(random=True), exclusive=exclusive)
    (path / NAMES[0].tar).write_bytes(b"cut")
    return path


def repair(path: Path, *, exclusive: bool = False) -> RepairSummary:
    accepts = ToyContent().accepts
    return repair_set(Location(path), toy_record(), planned(3), accepts, exclusive=exclusive)


def contents(path: Path) -> dict[str, bytes]:
    return {place.name: place.read_bytes() for place in path.iterdir() if place.is_file()}


def assert_repaired(path: Path, before: dict[str, bytes], *, exclusive: bool = False) -> None:
    assert build(path, 3, exclusive=exclusive).summary.num_built == 1
    after = contents(path)
    kept = [f"{name}.{suffix}" for name in NAMES[1:] for suffix in ("tar", "idx")]
    assert [after[name] == before[name] for name in kept] == [True] * 4
    with open_shard_set(path) as shard_set:
        assert len(shard_set.manifest.shards) == 3
    left = [place.name for place in path.parent.iterdir() if ".restored-" in place.name]
    assert left == []


def test_another_user_repairs_a_set(path: Path) -> None:
    before = contents(path)
    with another_user():
        assert repair(path).num_kept == 2
        assert_repaired(path, before)


def test_a_set_in_a_place_without_links_is_repaired(tmp_path: Path) -> None:
    with place_without_links(tmp_path) as place:
        place.limits()
        path = damaged_set(place.path / "toy")
        before = contents(path)
        assert repair(path).num_kept == 2
        assert_repaired(path, before)


def test_a_set_in_a_place_without_create_only_names_is_repaired(tmp_path: Path) -> None:
    with place_without_create_only_names(tmp_path) as place:
        place.limits()
        path = damaged_set(place.path / "toy", exclusive=True)
        before = contents(path)
        assert repair(path, exclusive=True).num_kept == 2
        assert_repaired(path, before, exclusive=True)


def test_without_the_promise_of_one_worker_such_a_set_stays_as_it_is(tmp_path: Path) -> None:
    with place_without_create_only_names(tmp_path) as place:
        place.limits()
        path = damaged_set(place.path / "toy", exclusive=True)
        before = contents(path)
        with pytest.raises(StorageError, match=r"cache\.exclusive"):
            repair(path)
        assert contents(path) == before
        assert folders_aside(Location(path)) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_repair_that_cannot_bring_shards_back_leaves_the_set_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    before, places = contents(path), sorted(path.parent.iterdir())
    refuse_links()
    monkeypatch.setattr(shutil, "copyfileobj", refuse)
    with pytest.raises(StorageError, match=os.strerror(number)):
        repair(path)
    assert contents(path) == before
    assert sorted(path.parent.iterdir()) == places


def test_a_user_who_may_not_write_beside_the_set_leaves_it_as_it_was(path: Path) -> None:
    before = contents(path)
    path.parent.chmod(0o555)
    with another_user(), pytest.raises(StorageError, match="let this user read and write"):
        repair(path)
    path.parent.chmod(0o755)
    assert contents(path) == before
    assert folders_aside(Location(path)) == []


def test_a_repair_killed_between_its_two_renames_is_continued(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(path)
    rename = Path.rename

    def be_killed(place: Path, target: Path) -> Path:
        if target == path:
            raise KeyboardInterrupt
        return rename(place, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", be_killed)
        with pytest.raises(KeyboardInterrupt):
            repair(path)
    assert not path.exists()
    assert repair(path).num_kept == 2
    assert_repaired(path, before)


@pytest.mark.parametrize("name", ["predictions", "images", ".checkpoints"])
def test_a_set_with_foreign_folders_in_it_is_neither_withdrawn_nor_repaired(
    path: Path, name: str
) -> None:
    (path / name).mkdir()
    before = contents(path)
    with pytest.raises(ConfigError, match=name):
        withdraw_set(Location(path))
    with pytest.raises(ConfigError, match=name):
        repair(path)
    assert contents(path) == before
    assert folders_aside(Location(path)) == []


def test_a_set_that_stays_where_it_is_has_nothing_staged_for_each_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "toy", 3)
    num_staged, stage = [], Directory.stage

    def staged(directory: Directory) -> StagedFile:
        num_staged.append(directory.path.name)
        return stage(directory)

    monkeypatch.setattr(Directory, "stage", staged)
    assert repair(tmp_path / "toy").num_kept == 3
    assert num_staged.count("toy") <= 1  # the set record
