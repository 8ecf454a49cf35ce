"""Places: what is done to a folder by its name is on the disk afterwards, and touches no other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdxl_distill.errors import StorageError
from sdxl_distill.storage.location import Location


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, set[str]]]:
    """Every folder that is synced, and the names that it has at that moment."""
    found: list[tuple[Path, set[str]]] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        found.append((path, {each.name for each in path.iterdir()}))

    monkeypatch.setattr(os, "fsync", record)
    return found


def test_a_renamed_folder_has_its_name_on_the_disk(
    tmp_path: Path, synced: list[tuple[Path, set[str]]]
) -> None:
    (tmp_path / "set").mkdir()
    Location(tmp_path / "set").rename(Location(tmp_path / "aside"))
    assert synced == [(tmp_path, {"aside"})]


def test_a_folder_that_was_made_is_on_the_disk(
    tmp_path: Path, synced: list[tuple[Path, set[str]]]
) -> None:
    location = Location(tmp_path / "cache" / "set")
    location.make()
    assert (tmp_path / "cache", {"set"}) in synced
    with pytest.raises(StorageError, match="set"):
        location.make()


def test_the_parent_of_a_new_name_is_made(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    Location(tmp_path / "set").rename(Location(tmp_path / "a" / "b" / "set"))
    assert (tmp_path / "a/b/set").is_dir()


def test_a_folder_that_is_gone_is_renamed_only_by_who_expects_that(tmp_path: Path) -> None:
    gone, target = Location(tmp_path / "gone"), Location(tmp_path / "target")
    gone.rename(target, missing_ok=True)
    assert not target.exists()
    with pytest.raises(StorageError, match="gone"):
        gone.rename(target)


def test_folders_are_listed_by_name_without_files(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    assert Location(tmp_path).folders() == ["a", "b", "c"]
    assert Location(tmp_path / "missing").folders() == []
    assert Location(tmp_path / "file").folders() == []


def test_siblings_are_what_lies_beside_with_the_prefix(tmp_path: Path) -> None:
    for name in ("set", "set.withdrawn-2", "set.withdrawn-1", "other"):
        (tmp_path / name).mkdir()
    location = Location(tmp_path / "set")
    assert location.siblings("set.") == [location.renamed(f"set.withdrawn-{n}") for n in (1, 2)]
    assert Location(tmp_path / "missing" / "set").siblings("set") == []


def test_only_what_is_its_own_is_removed_and_the_folder_only_when_empty(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / ".build" / "claims").mkdir(parents=True)
    (folder / "photos").mkdir()
    for name in ("set.json", "note.txt"):
        (folder / name).touch()
    location = Location(folder)
    location.remove_own([".build"], lambda name: name.endswith(".json"))
    assert sorted(each.name for each in folder.iterdir()) == ["note.txt", "photos"]
    location.remove_own(["photos"], lambda _name: True)
    assert not location.exists()
    location.remove_own(["photos"], lambda _name: True)  # another worker was first


def test_one_place_is_seen_from_another_through_links(tmp_path: Path) -> None:
    (tmp_path / "disk" / "latents").mkdir(parents=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "link").symlink_to(tmp_path / "disk" / "latents")
    seen = Location(tmp_path / "cache" / "link").seen_from(Location(tmp_path / "cache" / "teacher"))
    assert seen == "../../disk/latents"


def test_places_are_ordered_and_equal_by_their_paths(tmp_path: Path) -> None:
    first, second = Location(tmp_path / "a"), Location(tmp_path) / "b"
    assert sorted([second, first]) == [first, second]
    assert {first, Location(str(tmp_path / "a")), Location(first)} == {first}
    assert first != tmp_path / "a"
    assert (first.name, first.parent) == ("a", Location(tmp_path))
    assert (first.is_folder(), Location(tmp_path).is_folder()) == (False, True)


def test_a_removed_folder_is_gone_with_all_that_was_in_it(tmp_path: Path) -> None:
    (tmp_path / "set" / "inner").mkdir(parents=True)
    (tmp_path / "set" / "inner" / "file").touch()
    Location(tmp_path / "set").remove()
    assert not (tmp_path / "set").exists()
    Location(tmp_path / "set").remove()


@pytest.mark.parametrize("exclusive", [True, False])
def test_the_promise_of_one_worker_is_handed_on(tmp_path: Path, exclusive: bool) -> None:
    location = Location(tmp_path / "cache" / "set")
    with location.open(create=True, exclusive=exclusive) as directory:
        assert directory.volume.exclusive == exclusive
    assert location.is_folder()
