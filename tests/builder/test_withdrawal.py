"""A set is replaced as a whole, by rename; a repair keeps what is good."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
from support.toy_set import ToyContent, build, planned, toy_record

from sdxl_distill.builder.commit import publish_set_identity
from sdxl_distill.builder.launch import Launch
from sdxl_distill.builder.repair import RepairSummary, repair_set
from sdxl_distill.builder.set_builder import build_set
from sdxl_distill.builder.withdrawal import (
    folders_aside,
    is_withdrawn,
    kept_after_repair,
    withdraw_for_rebuild,
    withdraw_set,
)
from sdxl_distill.errors import ConfigError, IncompatibleError, StorageError
from sdxl_distill.runtime.world import World
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.set_folder import SetFolder
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.location import Location

NAMES = [shard.name for shard in planned(3)]


def names(path: Path) -> set[str]:
    return {place.name for place in path.iterdir()}


def tars(path: Path) -> dict[str, bytes]:
    return {place.name: place.read_bytes() for place in path.glob("*.tar")}


def repair(path: Path) -> RepairSummary:
    return repair_set(Location(path), toy_record(), planned(3), ToyContent().accepts)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Folder of a complete set whose bytes no second build would repeat."""
    build(tmp_path / "toy", 3, ToyContent(random=True))
    return tmp_path / "toy"


def test_a_withdrawn_set_is_rebuilt_and_then_removed(path: Path) -> None:
    before = tars(path)
    withdraw_set(Location(path))
    assert is_withdrawn(Location(path))
    assert not path.exists()
    build(path, 3, ToyContent(random=True))
    assert not is_withdrawn(Location(path))
    assert names(path.parent) == {"toy"}
    assert set(tars(path)) == set(before)
    assert all(tars(path)[name] != before[name] for name in before)


def test_an_unfinished_withdrawal_is_continued_not_repeated(path: Path) -> None:
    withdraw_set(Location(path))
    with pytest.raises(StorageError):
        build(path, 3, StopAfterOneShard())
    committed = {place.name for place in path.glob("*.idx")}
    assert committed
    inodes = {name: (path / name).stat().st_ino for name in committed}
    withdraw_for_rebuild(Launch(World(), {}), Location(path))
    build(path, 3)
    assert {name: (path / name).stat().st_ino for name in committed} == inodes


class StopAfterOneShard(ToyContent):
    """Fails in its third shard, as a disk would."""

    def compute(self, batch):
        if self.num_batches >= 7:
            raise StorageError("full")
        return super().compute(batch)


def test_a_first_build_that_replaces_keeps_its_progress_when_started_again(tmp_path: Path) -> None:
    path = tmp_path / "toy"
    withdraw_for_rebuild(Launch(World(), {}), Location(path))
    assert is_withdrawn(Location(path))
    with pytest.raises(StorageError):
        build(path, 3, StopAfterOneShard())
    withdraw_for_rebuild(Launch(World(), {}), Location(path))
    assert build(path, 3).summary.num_present >= 1
    assert names(tmp_path) == {"toy"}


def test_a_complete_set_is_withdrawn_again_by_the_next_launch(path: Path) -> None:
    for _ in range(2):
        withdraw_for_rebuild(Launch(World(), {}), Location(path))
        assert is_withdrawn(Location(path))
        build(path, 3)


def test_a_restarted_launch_withdraws_nothing(path: Path) -> None:
    withdraw_for_rebuild(Launch(World(), {"TORCHELASTIC_RESTART_COUNT": "1"}), Location(path))
    assert (path / "manifest.json").exists()


def test_a_job_array_withdraws_nothing_but_continues_a_withdrawal(path: Path) -> None:
    launch = Launch(World(), {"SLURM_ARRAY_TASK_ID": "1"})
    with pytest.raises(ConfigError, match="--withdraw-only"):
        withdraw_for_rebuild(launch, Location(path))
    assert (path / "manifest.json").exists()
    withdraw_set(Location(path))
    withdraw_for_rebuild(launch, Location(path))
    assert len(folders_aside(Location(path))) == 1


def test_another_configuration_may_replace_a_set(path: Path) -> None:
    withdraw_for_rebuild(Launch(World(), {}), Location(path))
    assert build(path, 3, ToyContent(seed=5)).manifest.identity.content == {"seed": 5}


def test_files_of_others_survive_a_withdrawal(path: Path) -> None:
    (path / "thesis.txt").write_text("irreplaceable")
    aside = withdraw_set(Location(path))
    build(path, 3)
    assert names(Path(str(aside))) == {"thesis.txt"}


def test_a_zombie_of_a_withdrawn_set_changes_no_byte_of_its_successor(path: Path) -> None:
    class Zombie(ToyContent):
        successor: ClassVar[dict[str, bytes]] = {}

        def compute(self, batch):
            if self.num_batches == 1:
                withdraw_set(Location(path))
                build(path, 3)
                self.successor.update(tars(path))
            return super().compute(batch)

    zombie = Zombie(random=True)
    (path / NAMES[0].tar).unlink()
    (path / NAMES[0].idx).unlink()
    with pytest.raises(StorageError, match="withdrawn or moved"):
        build(path, 4, zombie)
    assert tars(path) == zombie.successor
    assert len(zombie.successor) == 3


def test_a_link_to_a_set_elsewhere_is_withdrawn_where_the_set_is(
    path: Path, tmp_path: Path
) -> None:
    link = tmp_path / "links" / "toy"
    link.parent.mkdir()
    link.symlink_to(path)
    withdraw_set(Location(link))
    assert is_withdrawn(Location(link))
    build(link, 3)
    assert link.is_symlink()
    assert (path / "manifest.json").exists()
    assert names(link.parent) == {"toy"}


def _flip(place: Path) -> None:
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 0xFF
    place.write_bytes(content)


def _cut(place: Path) -> None:
    place.write_bytes(place.read_bytes()[:1000])


def _remove(place: Path) -> None:
    place.unlink()


def _fifo(place: Path) -> None:
    place.unlink()
    os.mkfifo(place)


@pytest.mark.parametrize("damage", [_flip, _cut, _remove, _fifo])
@pytest.mark.parametrize("suffix", ["tar", "idx"])
def test_a_repair_rebuilds_the_damaged_shard_and_keeps_the_others(
    path: Path, damage: Callable[[Path], None], suffix: str
) -> None:
    before = {name.tar: (path / name.tar).stat().st_ino for name in NAMES}
    damage(path / f"{NAMES[1]}.{suffix}")
    summary = repair(path)
    kept = {name for name in NAMES if (path / name.idx).exists()}
    orphan_is_good = (damage, suffix) == (_remove, "idx")
    assert kept == set(NAMES) if orphan_is_good else kept == {NAMES[0], NAMES[2]}
    assert (summary.num_kept, summary.num_missing) == (len(kept), 3 - len(kept))
    assert bool(summary.damage) == bool(summary.folders) == (not orphan_is_good)
    assert {name.tar: (path / name.tar).stat().st_ino for name in kept}.items() <= before.items()
    assert build(path, 3).summary.num_built == 3 - len(kept)


def test_a_repair_keeps_the_folder_as_it_was(path: Path) -> None:
    _cut(path / NAMES[0].tar)
    (folder,) = repair(path).folders
    build(path, 3)
    (kept,) = folders_aside(Location(path))
    assert kept == kept_after_repair(folder)
    assert (Path(str(kept)) / NAMES[0].tar).stat().st_size == 1000


def test_a_repair_that_finds_nothing_leaves_the_set_where_it_is(path: Path) -> None:
    before = {place.name: place.stat().st_ino for place in path.iterdir()}
    summary = repair(path)
    assert {place.name: place.stat().st_ino for place in path.iterdir()} == before
    assert (summary.num_kept, summary.damage, summary.folders) == (3, (), ())
    assert folders_aside(Location(path)) == []


def test_an_unfinished_set_in_which_nothing_is_damaged_is_left_where_it_is(path: Path) -> None:
    for name in ("manifest.json", NAMES[1].tar, NAMES[1].idx):
        (path / name).unlink()
    summary = repair(path)
    assert (summary.num_kept, summary.num_missing, summary.folders) == (2, 1, ())
    assert build(path, 3).summary.num_built == 1


def test_there_is_nothing_to_repair_where_there_is_no_set(tmp_path: Path) -> None:
    assert repair(tmp_path / "toy").num_missing == 3
    assert names(tmp_path) == set()


def test_an_interrupted_repair_is_continued(path: Path) -> None:
    before = tars(path)
    _cut(path / NAMES[0].tar)
    folder = withdraw_set(Location(path), for_repair=True)
    path.mkdir()
    os.link(Path(str(folder)) / NAMES[1].tar, path / NAMES[1].tar)  # and here the power fails
    assert repair(path).folders == (folder,)
    assert build(path, 3).summary.num_built == 1
    del before[NAMES[0].tar]
    assert before.items() <= tars(path).items()


def test_what_was_built_since_an_interrupted_repair_stays_and_gets_no_other_index(
    path: Path,
) -> None:
    withdraw_set(Location(path), for_repair=True)
    with pytest.raises(StorageError):
        build(path, 3, StopAfterOneShard(random=True))
    built = tars(path)
    assert 0 < len(built) < 3
    for index in path.glob("*.idx"):
        index.unlink()
    assert repair(path).num_kept == 3
    assert built.items() <= tars(path).items()
    manifest = build(path, 3).manifest
    assert [entry.tar_sha256 for entry in manifest.shards] == [
        hashlib.sha256((path / name.tar).read_bytes()).hexdigest() for name in NAMES
    ]


def test_what_was_damaged_since_an_interrupted_repair_is_repaired_too(path: Path) -> None:
    def interrupt(*_: object) -> Manifest:
        raise StorageError("interrupted")

    _cut(path / NAMES[0].tar)
    repair(path)
    with pytest.raises(StorageError):
        build_set(Location(path), toy_record(), planned(3), ToyContent, interrupt, World())
    _cut(path / NAMES[0].tar)
    assert len(repair(path).folders) == 2
    assert build(path, 3).summary.num_built == 1


def test_a_finished_repair_is_not_continued(path: Path) -> None:
    for name in NAMES[:2]:
        _cut(path / name.tar)
        before = folders_aside(Location(path))
        (folder,) = repair(path).folders
        assert folder not in before
        build(path, 3, ToyContent(random=True))
        (path / "manifest.json").unlink()
    assert len(folders_aside(Location(path))) == 2


def test_a_repair_rebuilds_a_pair_that_the_manifest_does_not_name(path: Path) -> None:
    build(path.parent / "other", 3, ToyContent(random=True))
    for suffix in ("tar", "idx"):
        name = f"{NAMES[2]}.{suffix}"
        (path / name).write_bytes((path.parent / "other" / name).read_bytes())
    assert repair(path).num_kept == 3
    manifest = build(path, 3).manifest
    digest = hashlib.sha256((path / NAMES[2].tar).read_bytes()).hexdigest()
    assert manifest.entry(NAMES[2]).tar_sha256 == digest


def test_a_repair_replaces_damaged_set_record_and_manifest(path: Path) -> None:
    before = tars(path)
    manifest = (path / "manifest.json").read_bytes()
    _flip(path / "set.json")
    _flip(path / "manifest.json")
    repair(path)
    build(path, 3)
    assert tars(path) == before
    assert (path / "manifest.json").read_bytes() == manifest


def test_a_repair_drops_shards_of_another_set(path: Path) -> None:
    build(path.parent / "other", 3, ToyContent(seed=1))
    for suffix in ("tar", "idx"):
        name = f"{NAMES[2]}.{suffix}"
        (path / name).write_bytes((path.parent / "other" / name).read_bytes())
    assert repair(path).num_kept == 2


def test_a_repair_with_another_configuration_touches_nothing(path: Path) -> None:
    before = names(path)
    with pytest.raises(IncompatibleError, match=r"content\.seed"):
        repair_set(Location(path), toy_record(seed=1), planned(3), ToyContent().accepts)
    assert names(path) == before
    assert folders_aside(Location(path)) == []


def test_a_repair_keeps_the_catalog(path: Path) -> None:
    (path / "catalog").mkdir()
    (path / "catalog" / "catalog-000000.parquet").write_bytes(b"rows")
    _cut(path / NAMES[0].tar)
    assert repair(path).folders
    assert (path / "catalog" / "catalog-000000.parquet").read_bytes() == b"rows"


def test_a_rebuild_does_not_take_an_unfinished_repair_for_its_own(path: Path) -> None:
    _cut(path / NAMES[0].tar)
    assert repair(path).folders
    withdraw_for_rebuild(Launch(World(), {}), Location(path))
    assert build(path, 3).summary.num_built == 3


def test_a_worker_that_slept_through_it_all_before_its_first_step_is_told(path: Path) -> None:
    with Directory(path) as zombie:
        withdraw_set(Location(path))
        build(path, 3)
        with pytest.raises(StorageError, match="withdrawn or moved"):
            publish_set_identity(SetFolder(zombie), toy_record())
