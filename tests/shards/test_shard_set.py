"""Opening a set: what is missing, damaged, foreign or replaced says so."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_distill.errors import (
    ConfigError,
    CorruptError,
    DistillError,
    IncompatibleError,
    StorageError,
)
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.set_identity import SetReference
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.shard_set import ShardSet, open_shard_set


def read_first(shard_set: ShardSet) -> None:
    shard_set.reader(shard_set.manifest.names()[0]).read_record(0)


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_set_opens_without_looking_at_its_shards(sets) -> None:
    small = sets.complete()
    for path in small.directory.glob("*-000*"):
        path.unlink()
    with open_shard_set(small.directory) as shard_set:
        assert shard_set.id == "teacher.v1"
        assert shard_set.manifest.num_records == 7


def test_a_folder_without_a_set_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no shard set"):
        open_shard_set(tmp_path / "nothing")


def test_a_set_that_is_not_finished_is_a_config_error(sets) -> None:
    small = sets.complete()
    (small.directory / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="not complete"):
        open_shard_set(small.directory)


def test_a_manifest_of_another_generation_is_refused(sets) -> None:
    small = sets.complete()
    newer = replace(small.identity, generation=2)
    (small.directory / "set.json").write_bytes(newer.to_bytes())
    with pytest.raises(IncompatibleError, match="generation 0"):
        open_shard_set(small.directory)


@pytest.mark.parametrize("suffix", ["tar", "idx"])
def test_a_missing_file_is_named(suffix: str, sets) -> None:
    small = sets.complete()
    path = small.directory / f"teacher.v1-64x64-000000.{suffix}"
    path.unlink()
    with open_shard_set(small.directory) as shard_set, pytest.raises(CorruptError) as caught:
        read_first(shard_set)
    assert caught.value.where == str(path)


class RememberedAbsence:
    """Answers as NFS does for a file that came after it was looked for: gone until listed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.is_remembered = True
        self.num_refusals = 0
        open_it = os.open

        def look(name: str | Path, *arguments: Any, **options: Any) -> int:
            if self.is_remembered and Path(name) == path:
                self.num_refusals += 1
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(name))
            return open_it(name, *arguments, **options)

        def forgetting(list_folder: Callable[..., Any]) -> Callable[..., Any]:
            def forget(folder: str | Path) -> Any:
                self.is_remembered &= Path(folder) != path.parent
                return list_folder(folder)

            return forget

        monkeypatch.setattr(os, "open", look)
        for call in ("listdir", "scandir"):  # one of them is what `Path.iterdir` calls
            monkeypatch.setattr(os, call, forgetting(getattr(os, call)))


@pytest.mark.parametrize("suffix", ["tar", "idx"])
def test_a_file_whose_absence_is_remembered_is_looked_for_again_after_listing(
    suffix: str, sets, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = sets.complete()
    with open_shard_set(small.directory) as shard_set:
        path = small.directory / f"teacher.v1-64x64-000000.{suffix}"
        absence = RememberedAbsence(monkeypatch, path)
        read_first(shard_set)
    assert absence.num_refusals == 1


@pytest.mark.parametrize("suffix", ["tar", "idx"])
def test_a_shard_under_the_name_of_another_is_refused(suffix: str, sets) -> None:
    small = sets.complete()
    target = small.directory / f"teacher.v1-64x64-000000.{suffix}"
    shutil.copy(small.directory / f"teacher.v1-64x64-000001.{suffix}", target)
    with open_shard_set(small.directory) as shard_set, pytest.raises(CorruptError):
        read_first(shard_set)


def test_a_pair_of_an_earlier_build_is_refused(sets) -> None:
    small = sets.complete(shards=((64, 64, 3),))
    name = small.indices[0].name
    other = sets.start(id="other", content={"teacher": "3" * 64, "version": "2"})
    other.add_shard(ShardName("other", 64, 64, 0), [small.indices[0].image_id(i) for i in range(3)])
    for suffix in ("tar", "idx"):
        source = other.directory / f"other-64x64-000000.{suffix}"
        shutil.copy(source, small.directory / getattr(name, suffix))
    with (
        open_shard_set(small.directory) as shard_set,
        pytest.raises(CorruptError, match="as the manifest says"),
    ):
        read_first(shard_set)


@pytest.mark.parametrize("num_bytes", [0, 512, -512])
def test_a_tar_of_another_size_is_refused_before_it_is_read(num_bytes: int, sets) -> None:
    small = sets.complete()
    path = small.directory / "teacher.v1-64x64-000000.tar"
    os.truncate(path, num_bytes if num_bytes >= 0 else path.stat().st_size + num_bytes)
    with open_shard_set(small.directory) as shard_set, pytest.raises(CorruptError, match="bytes"):
        read_first(shard_set)


@pytest.mark.parametrize(
    "name",
    ["set.json", "manifest.json", "teacher.v1-64x64-000000.tar", "teacher.v1-64x64-000000.idx"],
)
def test_a_fifo_in_place_of_a_file_does_not_hang(name: str, sets) -> None:
    small = sets.complete()
    (small.directory / name).unlink()
    os.mkfifo(small.directory / name)
    with pytest.raises(CorruptError, match="not a regular file"):
        read_first(open_shard_set(small.directory))


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_set_replaced_while_it_is_read_is_no_corruption(is_gone: bool, sets) -> None:
    small = sets.complete()
    with open_shard_set(small.directory) as shard_set:
        read_first(shard_set)
        name = shard_set.manifest.names()[1]
        (small.directory / name.tar).unlink()
        manifest = small.directory / "manifest.json"
        manifest.unlink()
        if not is_gone:
            manifest.write_bytes(Manifest.build(small.identity, 7, small.indices).to_bytes())
        with pytest.raises(StorageError, match="replaced while reading"):
            shard_set.reader(name)


def test_only_so_many_tars_are_open_at_once_and_none_after_closing(sets) -> None:
    small = sets.complete(shards=((64, 64, 1),) * 6)
    before = num_open_files()
    with open_shard_set(small.directory, max_open_shards=2) as shard_set:
        for name in shard_set.manifest.names():
            shard_set.reader(name).read_record(0)
        assert num_open_files() == before + 2
    assert num_open_files() == before


def test_a_reader_in_use_outlives_its_place_in_the_cache(sets) -> None:
    small = sets.complete()
    with open_shard_set(small.directory, max_open_shards=1) as shard_set:
        first, second = shard_set.manifest.names()[:2]
        reader = shard_set.reader(first)
        shard_set.reader(second)
        read = reader.read_record(0)
    assert np.array_equal(read["seed"].numpy(), small.written[first, 0]["seed"])


def test_the_empty_record_of_a_text_set_is_read(sets) -> None:
    small = sets.complete("text")
    with open_shard_set(small.directory) as shard_set:
        read = shard_set.read_empty_record()
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == {
        "encoder_hidden_states": (3, 4),
        "pooled_embeds": (5,),
    }


def test_a_damaged_empty_record_is_refused(sets) -> None:
    small = sets.complete("text")
    path = small.directory / "empty.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with open_shard_set(small.directory) as shard_set, pytest.raises(CorruptError):
        shard_set.read_empty_record()


def test_the_latents_set_is_found_from_the_predictions(sets) -> None:
    latents = sets.complete("latents")
    reference = SetReference(latents.identity.fingerprint, "../latents")
    small = sets.complete(latents=reference)
    with (
        open_shard_set(small.directory) as shard_set,
        shard_set.open_referenced("latents") as opened,
    ):
        assert opened.manifest.identity == latents.identity


def test_another_set_at_the_recorded_place_is_refused(sets) -> None:
    sets.complete("latents")
    small = sets.complete()
    with (
        open_shard_set(small.directory) as shard_set,
        pytest.raises(IncompatibleError, match="fingerprint"),
    ):
        shard_set.open_referenced("latents")


def test_a_reference_without_a_place_asks_for_one(sets) -> None:
    latents = sets.complete("latents")
    small = sets.complete(latents=SetReference(latents.identity.fingerprint, None))
    with open_shard_set(small.directory) as shard_set:
        with pytest.raises(ConfigError, match="does not say where"):
            shard_set.open_referenced("latents")
        with shard_set.open_referenced("latents", latents.directory) as opened:
            assert opened.id == "latents"


@pytest.mark.parametrize("name", ["set.json", "manifest.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 100])
def test_a_damaged_description_is_refused(name: str, content: bytes, sets) -> None:
    small = sets.complete()
    (small.directory / name).write_bytes(content)
    with pytest.raises(DistillError) as caught:
        open_shard_set(small.directory)
    assert isinstance(caught.value, CorruptError)
    assert name in str(caught.value)
