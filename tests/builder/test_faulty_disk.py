"""What a disk or its users may do to a build: it goes on, or ends with what was committed kept."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.places import another_user
from support.toy_set import ToyContent, build

from sdxl_distill.errors import ConfigError, StorageError
from sdxl_distill.runtime.world import World
from sdxl_distill.shards.shard_set import open_shard_set


class Disturbed(ToyContent):
    """Has something done to its disk before each batch that it computes."""

    def __init__(self, disturb: Callable[[], object]) -> None:
        super().__init__()
        self.disturb = disturb

    def compute(self, batch: Any) -> Any:
        self.disturb()
        return super().compute(batch)


@pytest.fixture
def path() -> Iterator[Path]:
    """A folder to be made, that every user can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder / "toy"
    shutil.rmtree(folder)


def leftovers(path: Path) -> list[str]:
    return [
        place.name
        for place in path.rglob("*")
        if place.is_file() and (".build" in place.parts or place.name.startswith(".tmp-"))
    ]


def test_claims_that_are_removed_again_and_again_hold_no_build_up(path: Path) -> None:
    built = build(path, 3, Disturbed(lambda: shutil.rmtree(path / ".build", ignore_errors=True)))
    assert built.summary.num_built == 3
    assert leftovers(path) == []


@pytest.mark.parametrize("opened", [".build", "claims", "workers"])
def test_claims_that_are_removed_while_they_are_being_opened_hold_no_build_up(
    path: Path, monkeypatch: pytest.MonkeyPatch, opened: str
) -> None:
    original, removed = os.open, list[str]()

    def removing(name: Any, *arguments: Any, **options: Any) -> int:
        if name == opened and not removed:
            removed.append(opened)
            shutil.rmtree(path / ".build")
        return original(name, *arguments, **options)

    monkeypatch.setattr(os, "open", removing)
    assert build(path, 2).summary.num_built == 2
    assert removed == [opened]
    assert leftovers(path) == []


def test_a_set_that_is_removed_ends_the_build(path: Path) -> None:
    with pytest.raises(StorageError, match="withdrawn or moved"):
        build(path, 1, Disturbed(lambda: shutil.rmtree(path, ignore_errors=True)))
    assert not path.exists()


def test_a_file_in_place_of_the_claims_ends_the_build_and_costs_nothing(path: Path) -> None:
    build(path, 1)
    committed = {place.name: place.read_bytes() for place in path.glob("*.tar")}

    def replace() -> None:
        if (path / ".build").is_dir():
            shutil.rmtree(path / ".build")
            (path / ".build").write_text("mine")

    with pytest.raises(StorageError, match="file stands where a folder should"):
        build(path, 3, Disturbed(replace))
    (path / ".build").unlink()
    assert committed.items() <= {p.name: p.read_bytes() for p in path.glob("*.tar")}.items()
    assert build(path, 3).summary.num_present >= 1


def test_claims_and_heartbeats_that_are_stale_hold_no_build_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, num_stale = os.open, 0

    def stale(name: Any, flags: int, *arguments: Any, **options: Any) -> int:
        nonlocal num_stale
        if str(name).endswith(".0") and not flags & (os.O_CREAT | os.O_WRONLY):
            num_stale += 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return original(name, flags, *arguments, **options)

    with Claimed(path):
        monkeypatch.setattr(os, "open", stale)
        assert build(path, 1).summary.num_built == 1
    assert num_stale > 0


def test_claims_and_heartbeats_that_are_stale_at_the_end_are_left_to_the_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, num_stale = os.unlink, 0

    def stale(name: Any, *arguments: Any, **options: Any) -> None:
        nonlocal num_stale
        if not str(name).startswith(".tmp-"):
            num_stale += 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        original(name, *arguments, **options)

    monkeypatch.setattr(os, "unlink", stale)
    assert build(path, 1).summary.num_built == 1
    assert num_stale > 0


def test_a_set_in_place_of_which_a_link_leads_to_itself_is_refused(path: Path) -> None:
    path.symlink_to(path.name)
    with pytest.raises(StorageError, match="broken link stands"):
        build(path, 1)


class Claimed:
    """The claim of a dead worker on the first shard."""

    def __init__(self, path: Path) -> None:
        self._claims = path / ".build/claims"

    def __enter__(self) -> None:
        self._claims.mkdir(parents=True)
        (self._claims / "toy-64x128-000000.0").write_text("0" * 32)

    def __exit__(self, *_exception: object) -> None:
        pass


def test_a_set_of_another_user_is_read_and_not_built_on(path: Path) -> None:
    build(path, 1)
    path.chmod(0o555)
    with another_user():
        with pytest.raises(StorageError, match="let this user read and write"):
            build(path, 2)
        with open_shard_set(path) as shard_set:
            assert len(shard_set.manifest.shards) == 1
    path.chmod(0o755)


def test_a_set_that_others_may_not_read_says_so(path: Path) -> None:
    before = os.umask(0o077)
    try:
        build(path, 1)
    finally:
        os.umask(before)
    if os.geteuid():
        path.chmod(0)
    with another_user(), pytest.raises(StorageError, match="let this user read and write"):
        open_shard_set(path)
    path.chmod(0o700)
    with open_shard_set(path) as shard_set:
        assert len(shard_set.manifest.shards) == 1


def test_the_promise_of_one_worker_is_not_made_to_a_launch_of_two(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cache\.exclusive"):
        build(path, 1, world=World(0, 2, 0, 2), exclusive=True)
    assert not path.exists()
