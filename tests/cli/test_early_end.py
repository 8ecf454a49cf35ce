"""The words of a run that ends early are true and name the command that goes on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from support.distill_cache import DistillCache

from sdxl_distill.cli.early_end import EarlyEnd
from sdxl_distill.errors import Preempted, StorageError
from sdxl_distill.train.checkpoint import Checkpoint
from sdxl_distill.train.run_folder import RunFolder

ARGV = ["--config", "c.json", "--resume", "runs/run/checkpoints/step-00000002"]


@pytest.fixture
def end(distill_cache: DistillCache, tmp_path: Path) -> EarlyEnd:
    return EarlyEnd(distill_cache.config(tmp_path), ARGV)


def save(end_folder: Path, distill_cache: DistillCache, step: int) -> None:
    tensors = {"student": {"weight": torch.ones(1)}, "optimizer": {}}
    folder = RunFolder.of(distill_cache.config(end_folder)).checkpoints()
    folder.save(step, Checkpoint({}, tensors))


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


def test_a_run_that_took_no_step_is_started_as_it_was(end: EarlyEnd) -> None:
    expected = "before it took a step; there is no checkpoint"
    with pytest.raises(Preempted, match=expected) as ended, end:
        interrupt()
    assert ended.value.action == f"sdxl-distill train {' '.join(ARGV)}"


def test_a_run_that_was_trained_is_exported_by_the_command_that_resumes(
    end: EarlyEnd, distill_cache: DistillCache, tmp_path: Path
) -> None:
    expected = "asked to stop before the export; the checkpoint of step 6 is kept"
    save(tmp_path, distill_cache, 6)
    end.is_trained = True
    with pytest.raises(Preempted, match=expected) as ended, end:
        interrupt()
    assert ended.value.action == "sdxl-distill train --config c.json --resume latest"


def test_a_run_that_saved_and_is_ended_at_once_says_what_it_saved(
    end: EarlyEnd, distill_cache: DistillCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with end, end.signals.deferred():
        save(tmp_path, distill_cache, 4)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.6)
        interrupt()
    assert end.exit_code == 130
    printed = capsys.readouterr().err
    assert "at once, and then the checkpoint of step 4 is kept" in printed
    assert "interrupted, and not saved; the checkpoint of step 4 is kept" in printed
    assert printed.endswith("→ sdxl-distill train --config c.json --resume latest\n")


def test_other_ranks_leave_the_words_to_the_main_one(
    distill_cache: DistillCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with EarlyEnd(distill_cache.config(tmp_path), ARGV) as end:
        interrupt()
    assert end.exit_code == 75
    assert capsys.readouterr() == ("", "")


def test_errors_pass_as_they_are(end: EarlyEnd) -> None:
    with pytest.raises(StorageError, match="full"), end:
        raise StorageError("full")
