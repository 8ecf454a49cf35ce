"""Fingerprints are remembered of files that have not changed, and of no others."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdxl_distill.demo.family import Family
from sdxl_distill.models import component, fingerprint_memory
from sdxl_distill.models.fingerprint_memory import memory_folder, remembered
from sdxl_distill.models.model_folder import ModelFolder

DIGEST, OTHER = "a" * 64, "b" * 64


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint_memory, "_SETTLED_SECONDS", 0.0)
    yield
    fingerprint_memory._distrusted = False


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    time.sleep(0.05)  # a file system's clock may lag behind the time
    return path


def again(path: Path, described: object = None, answer: str = OTHER) -> str:
    return remembered([path], described, lambda: answer)


def test_the_same_files_are_read_once(weights: Path) -> None:
    assert again(weights, answer=DIGEST) == DIGEST
    assert again(weights) == DIGEST
    assert again(weights, {"other": "fields"}) == OTHER


@pytest.mark.parametrize("keeps_times", [False, True])
def test_a_file_of_other_content_is_read_again(weights: Path, keeps_times: bool) -> None:
    assert again(weights, answer=DIGEST) == DIGEST
    before = weights.stat()
    weights.write_bytes(b"WEIGHTS")
    if keeps_times:  # as rsync and cp -p do
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert again(weights) == OTHER


def test_a_file_put_in_place_of_another_is_read_again(weights: Path, tmp_path: Path) -> None:
    assert again(weights, answer=DIGEST) == DIGEST
    copy = Path(shutil.copy2(weights, tmp_path / "copy"))
    copy.rename(weights)
    assert again(weights) == OTHER


def test_what_was_just_written_is_not_remembered(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint_memory, "_SETTLED_SECONDS", 60.0)
    assert again(weights, answer=DIGEST) == DIGEST
    assert again(weights) == OTHER


def test_what_changes_while_it_is_read_is_not_remembered(weights: Path) -> None:
    def change() -> str:
        weights.write_bytes(b"others")
        return DIGEST

    assert remembered([weights], None, change) == DIGEST
    assert again(weights) == OTHER


def test_distrust_reads_again_and_remembers_that(weights: Path) -> None:
    assert again(weights, answer=DIGEST) == DIGEST
    fingerprint_memory.distrust()
    assert again(weights) == OTHER
    fingerprint_memory._distrusted = False
    assert again(weights, answer=DIGEST) == OTHER


@pytest.mark.parametrize("content", [b"", b"nonsense", b'{"fingerprint": "x"}', b"[]", b"{}"])
def test_a_damaged_memory_is_not_believed(weights: Path, content: bytes) -> None:
    again(weights, answer=DIGEST)
    (entry,) = memory_folder().iterdir()
    entry.write_bytes(content)
    assert again(weights) == OTHER


def test_a_memory_that_cannot_be_written_costs_nothing(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(weights))  # a file
    assert again(weights, answer=DIGEST) == DIGEST
    assert again(weights) == OTHER


def test_the_oldest_are_forgotten(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_memory, "_MAX_ENTRIES", 3)
    for number in range(6):
        again(weights, number, DIGEST)
        time.sleep(0.01)
    assert len(list(memory_folder().iterdir())) == 3
    assert again(weights, 5) == DIGEST
    assert again(weights, 0) == OTHER


def test_a_checkpoint_is_hashed_once(tiny_family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ModelFolder.resolve(str(tiny_family.base)).unet_fingerprint()
    monkeypatch.setattr(component, "tensor_digests", lambda _: pytest.fail("it was read again"))
    assert ModelFolder.resolve(str(tiny_family.base)).unet_fingerprint() == first
