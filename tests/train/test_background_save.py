"""Checkpoints that are written while the run goes on."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch
from support.distill_cache import DistillCache

from sdxl_distill.errors import StorageError
from sdxl_distill.train import background_save
from sdxl_distill.train.background_save import BackgroundSave, Snapshot
from sdxl_distill.train.checkpoint import CheckpointFolder, load_checkpoint
from sdxl_distill.train.run_folder import RunFolder
from sdxl_distill.train.session import train_student


def test_a_snapshot_stays_while_its_tensor_moves_on_and_is_used_again() -> None:
    snapshot, weight = Snapshot(), torch.zeros(3, 4).T
    copy = snapshot.take("w", weight)
    weight += 1
    assert copy.sum() == 0
    assert copy.is_contiguous()
    again = snapshot.take("w", weight)
    assert again.sum() == 12
    assert again.data_ptr() == copy.data_ptr()


def test_one_at_a_time_and_the_next_waits() -> None:
    saves, order = BackgroundSave(), list[str]()
    release = threading.Event()

    def first() -> None:
        release.wait(60)
        order.append("first")

    saves.start(first)
    threading.Timer(0.2, release.set).start()
    saves.start(lambda: order.append("second"))
    saves.finish()
    assert order == ["first", "second"]


def test_what_failed_is_raised_once_in_the_runs_own_thread() -> None:
    saves = BackgroundSave()

    def fail() -> None:
        raise StorageError("no space", where="here", action="free some")

    saves.start(fail)
    with pytest.raises(StorageError, match="no space"):
        saves.finish()
    saves.finish()
    saves.check()


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Every checkpoint waits for this event, for at most a minute, before it is written."""
    original, release = CheckpointFolder.save, threading.Event()

    def save(folder: CheckpointFolder, *arguments: object) -> Path:
        assert threading.current_thread().name == "save"
        release.wait(60)
        return original(folder, *arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(CheckpointFolder, "save", save)
    return release


def test_steps_go_on_while_a_checkpoint_is_written_which_holds_what_was_there(
    distill_cache: DistillCache, trained_run: Path, tmp_path: Path, slow_disk: threading.Event
) -> None:
    steps: list[int] = []
    config = distill_cache.config(
        tmp_path, "training.num_steps=4", "training.checkpoint_every=2", "training.log_every=1"
    )
    original = background_save.BackgroundSave.check

    def check(saves: BackgroundSave) -> None:
        steps.append(len(steps))
        if len(steps) == 4:  # the fourth step begins with nothing written yet
            assert RunFolder.of(config).checkpoints().steps() == []
            slow_disk.set()
        original(saves)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BackgroundSave, "check", check)
        train_student(config)
    folder = RunFolder.of(config).checkpoints()
    assert folder.steps() == [2, 4]
    expected = trained_run / "runs" / "run" / "checkpoints"
    for step in (2, 4):
        name = f"step-{step:08d}"
        mine, theirs = load_checkpoint(folder.path / name), load_checkpoint(expected / name)
        for stem, tensors in theirs.tensors.items():
            for key, tensor in tensors.items():
                assert torch.equal(mine.tensors[stem][key], tensor), (step, stem, key)


def test_a_disk_that_refuses_ends_the_run(
    distill_cache: DistillCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Path:
        raise StorageError("No space left on device", where="disk", action="free some")

    monkeypatch.setattr(CheckpointFolder, "save", refuse)
    config = distill_cache.config(
        tmp_path, "training.num_steps=1000", "training.checkpoint_every=1"
    )
    with pytest.raises(StorageError, match="No space left"):
        train_student(config)


def test_where_memory_is_short_it_writes_in_the_foreground_and_says_so_once(
    distill_cache: DistillCache,
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(background_save, "free_memory", lambda: 1000)
    config = distill_cache.config(tmp_path, "training.num_steps=4")
    with caplog.at_level(logging.INFO):
        train_student(config)
    assert caplog.text.count("main memory has 0.0 GB free") == 1
    path = RunFolder.of(config).checkpoints().path / "step-00000004"
    expected = trained_run / "runs" / "run" / "checkpoints" / "step-00000004"
    for name in ("student", "optimizer", "ema"):
        file = f"{name}.safetensors"
        assert (path / file).read_bytes() == (expected / file).read_bytes()
