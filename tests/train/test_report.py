"""Means and rates that are logged, from sums that are counted."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdxl_distill.errors import StorageError
from sdxl_distill.train.report import RunReport, loss_tags

TAGS = loss_tags(["ann"])


def report_in(folder: Path, num_done: int = 0) -> RunReport:
    return RunReport("run", folder, TAGS, Accelerator(cpu=True), num_steps=10, num_done=num_done)


def test_tags_are_loss_floor_and_one_per_teacher() -> None:
    assert loss_tags(["a", "b"], "x") == ("x/loss", "x/loss_floor", "x/loss_a", "x/loss_b")


def test_means_are_over_the_records_since_the_last_log(tmp_path: Path) -> None:
    with report_in(tmp_path) as report:
        report.count(torch.tensor([6.0, 3.0, 9.0]), 2, 0.0)
        report.count(torch.tensor([2.0, 1.0, 3.0]), 2, 0.0)
        report.log(2, 0, 1e-3, torch.tensor(0.5))
        assert [report.latest[tag] for tag in TAGS] == [2.0, 1.0, 3.0]
        report.count(torch.tensor([5.0, 5.0, 5.0]), 1, 0.0)
        report.log(3, 0, 1e-3, torch.tensor(0.5))
        assert [report.latest[tag] for tag in TAGS] == [5.0, 5.0, 5.0]


def test_rates_are_of_the_time_that_passed(tmp_path: Path) -> None:
    """The report's own clock runs between two of ours, however busy the machine is."""
    before = time.perf_counter()
    with report_in(tmp_path) as report:
        after_start = time.perf_counter()
        time.sleep(0.05)
        report.count(torch.zeros(3), 8, 0.1)
        before_log = time.perf_counter()
        report.log(1, 0, 1e-3, torch.tensor(0.5))
        after = time.perf_counter()
    least, most = before_log - after_start, after - before
    assert 8 / most <= report.latest["distill/images_per_second"] <= 8 / least
    waited = report.latest["distill/data_wait"]
    assert 0.1 / most <= waited * (1 + 2**-20) and waited <= 0.1 / least * (1 + 2**-20)


def test_events_of_a_killed_run_are_hidden_from_the_resumed_step_on(tmp_path: Path) -> None:
    with report_in(tmp_path) as report:
        for step in range(1, 7):
            report.write(step, {"x": float(step)})
    with report_in(tmp_path, num_done=4) as report:
        report.write(5, {"x": 50.0})
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert [(event.step, event.value) for event in accumulator.Scalars("x")] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0),
    ]  # fmt: skip


def test_a_log_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/logs"):
        report_in(tmp_path / "file" / "logs")
