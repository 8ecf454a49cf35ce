"""A build that finds a manifest looks whether what it names is there, and parses it once."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from support.shard_sets import ShardSets
from support.toy_set import ToyContent, build, toy_record

from sdxl_distill.builder.existing_manifest import ExistingManifest, require_files
from sdxl_distill.builder.work_queue import Claim, WorkQueue
from sdxl_distill.errors import CorruptError
from sdxl_distill.runtime.world import World
from sdxl_distill.shards.manifest import MANIFEST_NAME, Manifest
from sdxl_distill.shards.set_folder import EMPTY_RECORD_NAME, SetFolder
from sdxl_distill.storage.fsio import Directory

STEM = "toy-64x128-000002"


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("suffix", "damage", "found"),
    [
        ("tar", remove, "is missing"),
        ("tar", cut, "has 20479 bytes instead of 20480"),
        ("tar", put_folder, "is not a regular file"),
        ("idx", cut, "bytes instead of"),
    ],
    ids=["tar missing", "tar cut", "tar a folder", "index cut"],
)
@pytest.mark.parametrize("num_shards", [5, 6], ids=["complete", "growing"])
def test_a_build_does_not_call_a_set_complete_that_lacks_a_file(
    suffix: str, damage, found: str, num_shards: int, tmp_path: Path
) -> None:
    build(tmp_path / "toy")
    path = tmp_path / "toy" / f"{STEM}.{suffix}"
    damage(path)
    content = ToyContent()
    with pytest.raises(CorruptError, match="--repair") as caught:
        build(tmp_path / "toy", num_shards, content)
    assert content.num_batches == 0  # before anything is built for it
    assert caught.value.where == str(path)
    assert found in caught.value.found
    assert caught.value.exit_code == 3


def test_all_missing_files_are_counted(tmp_path: Path) -> None:
    build(tmp_path / "toy")
    for path in (tmp_path / "toy").glob("*.tar"):
        path.unlink()
    with pytest.raises(CorruptError, match="4 other files"):
        build(tmp_path / "toy")


def test_a_missing_index_is_made_again_from_its_tar(tmp_path: Path) -> None:
    build(tmp_path / "toy")
    path = tmp_path / "toy" / f"{STEM}.idx"
    content = path.read_bytes()
    path.unlink()
    toy = ToyContent()
    summary = build(tmp_path / "toy", content=toy).summary
    assert (summary.num_adopted, summary.num_built, summary.num_duplicates) == (1, 0, 0)
    assert toy.num_batches == 0  # nothing is computed for it
    assert path.read_bytes() == content


def test_an_adopted_shard_says_nothing_of_how_long_one_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took no time: by its measure every other worker would be a straggler."""
    build(tmp_path / "toy")
    (tmp_path / "toy" / f"{STEM}.idx").unlink()
    released: dict[str, bool] = {}
    release = WorkQueue.release

    def record(self: WorkQueue, claim: Claim, *, committed: bool) -> None:
        released[claim.unit] = committed
        release(self, claim, committed=committed)

    monkeypatch.setattr(WorkQueue, "release", record)
    assert build(tmp_path / "toy").summary.num_adopted == 1
    assert released[STEM] is False


def test_a_text_set_without_its_empty_record_is_not_complete(tmp_path: Path) -> None:
    sets = ShardSets(tmp_path, {(64, 64, 0): 1})
    latents = sets.latents()
    for path in (latents, sets.text()):
        manifest = Manifest.from_bytes((path / MANIFEST_NAME).read_bytes(), "x")
        with Directory(path) as directory:
            require_files(directory, manifest)
            directory.remove(EMPTY_RECORD_NAME)
            if path == latents:
                require_files(directory, manifest)
            else:
                with pytest.raises(CorruptError, match=f"{EMPTY_RECORD_NAME}.*is missing"):
                    require_files(directory, manifest)


def test_one_process_of_a_launch_looks_for_all(tmp_path: Path) -> None:
    build(tmp_path / "toy")
    (tmp_path / "toy" / f"{STEM}.tar").unlink()
    build(tmp_path / "toy", world=World(rank=1, size=2))
    with pytest.raises(CorruptError):
        build(tmp_path / "toy", world=World(rank=0, size=2))


def test_a_manifest_is_parsed_again_only_when_it_is_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(tmp_path / "toy").manifest
    parsed: list[int] = []
    parse = Manifest.from_bytes

    def counted(content: bytes, where: str) -> Manifest:
        parsed.append(len(content))
        return parse(content, where)

    monkeypatch.setattr(Manifest, "from_bytes", counted)
    with Directory(tmp_path / "toy") as directory:
        existing = ExistingManifest(SetFolder(directory))
        for _ in range(5):
            assert existing.read() == first
        assert len(parsed) == 1
        later = replace(first, catalog=1)
        directory.replace_bytes(MANIFEST_NAME, later.to_bytes())
        assert [existing.read(), existing.read()] == [later, later]
        assert len(parsed) == 2
        directory.remove(MANIFEST_NAME)
        assert existing.read() is None
        directory.replace_bytes(MANIFEST_NAME, b"damaged")
        assert [existing.read(), existing.read()] == [None, None]
        assert len(parsed) == 3


def test_a_manifest_of_another_record_is_no_proof_of_anything(tmp_path: Path) -> None:
    build(tmp_path / "toy")
    manifest = build(tmp_path / "toy").manifest
    other = replace(manifest, identity=replace(toy_record(), generation=2))
    (tmp_path / "toy" / MANIFEST_NAME).unlink()
    (tmp_path / "toy" / MANIFEST_NAME).write_bytes(other.to_bytes())
    assert build(tmp_path / "toy").manifest == manifest
