"""What a run shows: progress bar, TensorBoard scalars, and the rates behind them.

Sums stay on the device until they are logged; logging is the one place that waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import torch
from accelerate import Accelerator
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sdxl_distill.storage.regular_file import storage_errors
from sdxl_distill.train.agreement import sum_over_ranks

PREFIX: Final = "distill"


def loss_tags(teacher_ids: Sequence[str], prefix: str = PREFIX) -> tuple[str, ...]:
    """Return the tags of `step.RecordLosses.sums`: loss, floor, then each teacher's loss."""
    teachers = (f"{prefix}/loss_{teacher_id}" for teacher_id in teacher_ids)
    return (f"{prefix}/loss", f"{prefix}/loss_floor", *teachers)


def _open_writer(log_folder: Path, first_step: int) -> SummaryWriter:
    with storage_errors(log_folder):
        return SummaryWriter(str(log_folder), purge_step=first_step)


class RunReport:
    """Progress and logs of one run; a context that closes both.

    Args:
        name: the run's name, shown before the bar.
        log_folder: folder of TensorBoard's event files.
        tags: names of the loss sums, as `loss_tags` returns them.
        accelerator: adds the ranks' sums; its main process shows and writes.
        num_steps: number of steps of the whole run.
        num_done: number of steps done before this process; a killed run's later events are hidden.

    Raises:
        StorageError: when the log folder cannot be written.
    """

    def __init__(
        self,
        name: str,
        log_folder: Path,
        tags: Sequence[str],
        accelerator: Accelerator,
        *,
        num_steps: int,
        num_done: int,
    ) -> None:
        is_main = accelerator.is_main_process
        self.latest: dict[str, float] = {}
        self._tags = tuple(tags)
        self._accelerator = accelerator
        self._writer = _open_writer(log_folder, num_done + 1) if is_main else None
        self._progress = tqdm(
            total=num_steps,
            initial=num_done,
            desc=name,
            unit="step",
            disable=not is_main,
            dynamic_ncols=True,
        )
        self._restart()

    def __enter__(self) -> RunReport:
        return self

    def __exit__(self, *_exception: object) -> None:
        with suppress(BrokenPipeError):
            self._progress.close()
        if self._writer is not None:
            self._writer.close()

    def count(self, loss_sums: torch.Tensor, num_records: int, waited_seconds: float) -> None:
        """Count one step of this rank; `loss_sums` is float32 [2 + K] on the device."""
        self._loss_sums += loss_sums
        self._num_records += num_records
        self._waited_seconds += waited_seconds
        with suppress(BrokenPipeError):  # Ctrl-C ends `| tee` too, and the run is still to be saved
            self._progress.update()

    def log(
        self, global_step: int, epoch: int, learning_rate: float, grad_norm: torch.Tensor
    ) -> None:
        """Write the means over all ranks' records since the last log."""
        own = torch.tensor([self._num_records, self._waited_seconds], device=grad_norm.device)
        totals = sum_over_ranks(self._accelerator, torch.cat([self._loss_sums, own]))
        *losses, num_records, waited_seconds = totals.tolist()
        seconds = time.perf_counter() - self._started_seconds
        images_per_second = num_records / seconds
        self.write(
            global_step,
            {
                **{tag: loss / num_records for tag, loss in zip(self._tags, losses, strict=True)},
                f"{PREFIX}/lr": learning_rate,
                f"{PREFIX}/grad_norm": float(grad_norm),
                f"{PREFIX}/epoch": float(epoch),
                f"{PREFIX}/images_per_second": images_per_second,
                f"{PREFIX}/data_wait": waited_seconds / self._accelerator.num_processes / seconds,
            },
        )
        with suppress(BrokenPipeError):
            self._progress.set_postfix_str(
                f"loss {losses[0] / num_records:.4g}, {images_per_second:.1f} images/s"
            )
        self._restart()

    def write(self, global_step: int, scalars: Mapping[str, float]) -> None:
        """Write named values of one step, and remember them as the latest."""
        self.latest |= scalars
        for tag, value in scalars.items():
            self._add(tag, value, global_step)

    def note_stall(self, global_step: int, seconds: float) -> None:
        """Write for how long a checkpoint held the steps up."""
        self._add(f"{PREFIX}/checkpoint_stall", seconds, global_step)

    def _add(self, tag: str, value: float, global_step: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(tag, value, global_step)

    def _restart(self) -> None:
        self._loss_sums = torch.zeros(len(self._tags), device=self._accelerator.device)
        self._num_records = 0
        self._waited_seconds = 0.0
        self._started_seconds = time.perf_counter()
