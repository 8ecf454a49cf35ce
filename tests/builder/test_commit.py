"""Publication is create-only, tar first, and what is there already decides what the index says."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.toy_set import ToyContent, build, describe, keys_of, planned, toy_record

from sdxl_distill.builder.commit import (
    adopt_shard,
    commit_shard,
    publish_set_identity,
    shard_header,
)
from sdxl_distill.builder.set_builder import BuiltSet, build_set
from sdxl_distill.errors import CorruptError, IncompatibleError, StorageError
from sdxl_distill.runtime.world import World
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.set_folder import SetFolder
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.shards.writer import ShardWriter
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.location import Location
from sdxl_distill.storage.publication import Publication, Volume
from sdxl_distill.storage.regular_file import LostDirectoryError
from sdxl_distill.storage.staged_file import StagedFile

SHARD = planned(1)[0]
NAME = SHARD.name
HEADER = shard_header(toy_record(), SHARD)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with Directory(tmp_path / "toy", create=True) as opened:
        yield opened


def write(staged: StagedFile, content: ToyContent) -> ShardIndex:
    writer = ShardWriter(staged, NAME, HEADER)
    for batch in content.read(SHARD):
        for encoded in content.encode(content.compute(batch), HEADER):
            writer.write(*encoded)
    return writer.close()


def commit(directory: Directory, content: ToyContent) -> tuple[ShardIndex, ShardIndex]:
    with directory.stage() as staged:
        own = write(staged, content)
        return own, commit_shard(SetFolder(directory), staged, own, content.accepts)


def index_on_disk(directory: Directory) -> ShardIndex:
    return ShardIndex.from_bytes(directory.read(NAME.idx, 1 << 20), NAME)


def index_of_disk_tar(directory: Directory) -> ShardIndex:
    return SetFolder(directory).index_of_tar(NAME, HEADER)


def test_a_commit_leaves_exactly_tar_and_index(directory: Directory) -> None:
    own, published = commit(directory, ToyContent())
    assert published is own
    assert directory.names() == {NAME.tar, NAME.idx}
    assert index_on_disk(directory).to_bytes() == index_of_disk_tar(directory).to_bytes()


def test_an_index_is_on_the_disk_before_its_tar_has_a_name(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full for the index must not leave a tar without one."""
    synced: list[bytes] = []
    named: list[tuple[str, list[bytes]]] = []
    fsync, link = os.fsync, os.link

    def record_sync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}")
        synced.append(path.read_bytes() if path.is_file() else b"")

    def record_name(source: str, target: str, **options: Any) -> None:
        link(source, target, **options)
        named.append((target, list(synced)))

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "link", record_name)
    directory.volume = Volume(publication=Publication.LINK)
    own, _ = commit(directory, ToyContent())
    (first, before_tar), (second, before_index) = named
    assert (first, second) == (NAME.tar, NAME.idx)
    assert own.to_bytes() in before_tar
    assert directory.read(NAME.tar, 1 << 20) in before_tar
    assert before_index[-1] == own.to_bytes()
    assert b"" in before_index  # the folder, with the tar's name in it


def test_a_disk_that_is_full_for_the_index_gets_no_tar_either(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = StagedFile.seal

    def seal_tars_only(staged: StagedFile) -> None:
        staged.file.flush()
        if staged.file.tell() < 10_000:  # the index
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        seal(staged)

    monkeypatch.setattr(StagedFile, "seal", seal_tars_only)
    with pytest.raises(StorageError, match="free some space"):
        commit(directory, ToyContent())
    assert directory.names() == set()


def test_the_second_builder_changes_nothing_and_learns_what_is_there(directory: Directory) -> None:
    first, _ = commit(directory, ToyContent(random=True))
    second, published = commit(directory, ToyContent(random=True))
    assert published.digest == first.digest != second.digest
    assert index_on_disk(directory).digest == first.digest
    assert index_of_disk_tar(directory).digest == first.digest


def test_an_orphan_tar_gets_its_own_index_not_the_second_builders(directory: Directory) -> None:
    first, _ = commit(directory, ToyContent(random=True))
    directory.remove(NAME.idx)
    _, published = commit(directory, ToyContent(random=True))
    assert published.digest == index_on_disk(directory).digest == first.digest


def test_a_tar_without_index_is_adopted_without_building(directory: Directory) -> None:
    first, _ = commit(directory, ToyContent(random=True))
    directory.remove(NAME.idx)
    adopted = adopt_shard(SetFolder(directory), NAME, HEADER, ToyContent().accepts)
    assert adopted is not None
    assert index_on_disk(directory).digest == adopted.digest == first.digest


def test_there_is_nothing_to_adopt_in_an_empty_folder(directory: Directory) -> None:
    assert adopt_shard(SetFolder(directory), NAME, HEADER, ToyContent().accepts) is None


def test_what_was_swept_while_the_builder_slept_is_lost_and_typed(directory: Directory) -> None:
    with directory.stage() as staged:
        own = write(staged, ToyContent())
        directory.remove(staged.temporary_name)
        with pytest.raises(LostDirectoryError):
            commit_shard(SetFolder(directory), staged, own, ToyContent().accepts)
    assert directory.names() == set()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


def _flip_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [_cut, _flip_header, _empty, _fifo, _folder])
def test_a_damaged_tar_is_refused_and_the_message_names_repair(
    directory: Directory, damage
) -> None:
    commit(directory, ToyContent())
    directory.remove(NAME.idx)
    damage(directory.path / NAME.tar)
    before = (directory.path / NAME.tar).stat()
    with pytest.raises(CorruptError, match="--repair"):
        adopt_shard(SetFolder(directory), NAME, HEADER, ToyContent().accepts)
    assert os.path.samestat(before, (directory.path / NAME.tar).stat())
    assert not directory.exists(NAME.idx)


def test_a_tar_of_another_set_is_refused(directory: Directory) -> None:
    commit(directory, ToyContent())
    directory.remove(NAME.idx)
    other = shard_header(toy_record(seed=1), SHARD)
    with pytest.raises(CorruptError, match="--repair"):
        adopt_shard(SetFolder(directory), NAME, other, ToyContent().accepts)


def test_a_tar_made_from_another_latents_shard_is_refused(directory: Directory) -> None:
    commit(directory, ToyContent())
    directory.remove(NAME.idx)
    other = shard_header(toy_record(), replace(SHARD, source_sha256="a" * 64))
    with pytest.raises(CorruptError, match="--repair"):
        adopt_shard(SetFolder(directory), NAME, other, ToyContent().accepts)


def test_a_tar_with_other_keys_is_refused(directory: Directory) -> None:
    commit(directory, ToyContent())
    directory.remove(NAME.idx)
    with pytest.raises(CorruptError, match=r"not those of this shard.*\n.*--repair"):
        adopt_shard(
            SetFolder(directory), NAME, HEADER, lambda index: index.keys() == keys_of(NAME, 3)
        )


def test_the_set_record_is_written_once(directory: Directory) -> None:
    publish_set_identity(SetFolder(directory), toy_record())
    before = (directory.path / "set.json").stat()
    assert publish_set_identity(SetFolder(directory), toy_record()) == toy_record()
    assert os.path.samestat(before, (directory.path / "set.json").stat())


def test_a_set_record_that_vanishes_between_two_looks_is_written_again(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, answers = Directory.publish_bytes, [False]

    def publish_late(self: Directory, name: str, content: bytes) -> bool:
        """Find a file of another worker, which is gone a moment later."""
        return answers.pop() if answers else publish(self, name, content)

    monkeypatch.setattr(Directory, "publish_bytes", publish_late)
    assert publish_set_identity(SetFolder(directory), toy_record()) == toy_record()
    assert answers == []
    assert (directory.path / "set.json").read_bytes() == toy_record().to_bytes()


def test_another_configuration_is_refused_with_the_fields_that_differ(directory: Directory) -> None:
    publish_set_identity(SetFolder(directory), toy_record(seed=1))
    with pytest.raises(IncompatibleError, match=r"content\.seed 1, not 2"):
        publish_set_identity(SetFolder(directory), toy_record(seed=2))


def test_a_damaged_set_record_names_repair(directory: Directory) -> None:
    (directory.path / "set.json").write_bytes(b'{"kind": "latents"}')
    with pytest.raises(CorruptError, match="--repair"):
        publish_set_identity(SetFolder(directory), toy_record())


def test_nothing_is_loaded_for_a_folder_of_another_configuration(tmp_path: Path) -> None:
    build(tmp_path / "toy", 1, ToyContent(seed=1))

    def load() -> ToyContent:
        raise AssertionError("loaded")

    with pytest.raises(IncompatibleError):
        build_set(Location(tmp_path / "toy"), toy_record(2), planned(1), load, describe, World())


def test_any_finisher_writes_the_same_manifest(tmp_path: Path) -> None:
    path = tmp_path / "toy"
    first = build(path, 3)
    content = (path / "manifest.json").read_bytes()
    assert Manifest.from_bytes(content, "manifest") == first.manifest
    for damage in (b"", b"{}", content[:-1]):
        (path / "manifest.json").write_bytes(damage)
        build(path, 3, world=World(1, 2, 1, 2))
        assert (path / "manifest.json").read_bytes() == content


def build_grown(path: Path) -> BuiltSet:
    return build_set(
        Location(path),
        toy_record(),
        planned(4),
        ToyContent,
        lambda _, record, indices: Manifest.build(record, 1, indices),
        World(),
        catalog=1,
    )


def test_a_manifest_of_a_greater_catalog_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "toy"
    grown = build_grown(path)
    assert build(path, 3).manifest == grown.manifest
    assert Manifest.from_bytes((path / "manifest.json").read_bytes(), "m") == grown.manifest


def test_a_grown_catalog_replaces_the_manifest_and_no_shard(tmp_path: Path) -> None:
    path = tmp_path / "toy"
    build(path, 3)
    before = {place.name: place.stat().st_ino for place in path.glob("toy-*")}
    grown = build_grown(path)
    after = {place.name: place.stat().st_ino for place in path.glob("toy-*")}
    assert before.items() <= after.items()
    assert (grown.manifest.catalog, len(grown.manifest.shards)) == (1, 4)


def test_a_finisher_that_slept_does_not_replace_the_manifest_of_a_later_catalog(
    tmp_path: Path,
) -> None:
    path = tmp_path / "toy"
    later: list[Manifest] = []

    def describe_and_sleep(
        directory: Directory, identity: SetIdentity, indices: Iterable[ShardIndex]
    ) -> Manifest:
        manifest = describe(directory, identity, indices)
        (path / ".build/claims/finish.0").unlink()  # as if it had slept too long
        later.append(build_grown(path).manifest)
        return manifest

    finished = build_set(
        Location(path), toy_record(), planned(3), ToyContent, describe_and_sleep, World()
    )
    assert later[0].catalog == 1
    assert finished.manifest == later[0]
    assert Manifest.from_bytes((path / "manifest.json").read_bytes(), "m") == later[0]


def other_identity(indices: list[ShardIndex]) -> Manifest:
    return Manifest.build(replace(toy_record(), generation=2), 1, indices)


def other_sources(indices: list[ShardIndex]) -> Manifest:
    manifest = Manifest.build(toy_record(), 1, indices)
    shards = tuple(entry._replace(source_sha256="b" * 64) for entry in manifest.shards)
    return replace(manifest, shards=shards)


def fewer_shards(indices: list[ShardIndex]) -> Manifest:
    return Manifest.build(toy_record(), 1, indices[:2])


@pytest.mark.parametrize("make", [other_identity, other_sources, fewer_shards])
def test_a_manifest_of_a_greater_catalog_that_lacks_what_was_built_does_not_come_back(
    tmp_path: Path, make: Callable[[list[ShardIndex]], Manifest]
) -> None:
    path = tmp_path / "toy"
    num_calls = 0

    def describe_beside_another(
        directory: Directory, identity: SetIdentity, indices: Iterable[ShardIndex]
    ) -> Manifest:
        nonlocal num_calls
        num_calls += 1
        assert num_calls == 1, "what was written did not stay"
        all_indices = list(indices)
        directory.replace_bytes("manifest.json", make(all_indices).to_bytes())
        return describe(directory, identity, all_indices)

    built = build_set(
        Location(path), toy_record(), planned(3), ToyContent, describe_beside_another, World()
    )
    assert built.manifest.catalog == 0
    assert Manifest.from_bytes((path / "manifest.json").read_bytes(), "m") == built.manifest


@pytest.mark.parametrize("suffix", ["tar", "idx"])
def test_a_shard_damaged_before_the_finish_names_repair(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "toy"
    build(path, 2)
    (path / "manifest.json").unlink()
    _cut(path / f"{NAME}.{suffix}")
    with pytest.raises(CorruptError, match="--repair"):
        build(path, 2)
    assert not (path / "manifest.json").exists()


def test_a_stale_shard_is_refused_when_finishing(tmp_path: Path) -> None:
    path = tmp_path / "toy"
    build(path, 1)
    today = [replace(SHARD, source_sha256="b" * 64)]
    with pytest.raises(IncompatibleError, match=r"planned for other images.*\n.*--repair"):
        build_set(Location(path), toy_record(), today, ToyContent, describe, World())


def test_records_of_a_shard_depend_on_the_shard_alone(tmp_path: Path) -> None:
    left, right = (build(tmp_path / name, 4, world=world).manifest for name, world in WORLDS)
    assert left == right
    for name in left.names():
        tars = [(tmp_path / folder / name.tar).read_bytes() for folder, _ in WORLDS]
        assert tars[0] == tars[1]


WORLDS = (("a", World()), ("b", World(1, 2, 1, 2)))


def test_the_toy_shards_hold_different_bytes_when_random() -> None:
    content = ToyContent(random=True)
    batch = next(content.read(SHARD))
    left, right = content.compute(batch), content.compute(batch)
    assert not np.array_equal(left[2][0], right[2][0])
