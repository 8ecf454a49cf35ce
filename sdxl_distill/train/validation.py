"""Losses on images that are never trained on, for the student and for its average."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator

from sdxl_distill.runtime.stop_request import StopRequest
from sdxl_distill.stream.batch import JoinedBatch
from sdxl_distill.stream.loader import JoinedStream
from sdxl_distill.train.agreement import sum_over_ranks
from sdxl_distill.train.report import PREFIX, RunReport, loss_tags
from sdxl_distill.train.step import DistillationStep


class Validation:
    """Logs the losses on held-out images.

    Args:
        step: holds the student.
        stream: has the held-out records.
        batch_size: records in one forward pass.
        max_records: most records of all ranks, always the same ones; None takes all held-out ones.
        accelerator: the ranks.
    """

    def __init__(
        self,
        step: DistillationStep,
        stream: JoinedStream,
        batch_size: int,
        max_records: int | None,
        accelerator: Accelerator,
    ) -> None:
        self._step = step
        self._stream = stream
        self._batch_size = batch_size
        self._max_records = max_records
        self._accelerator = accelerator

    def run(self, name: str, report: RunReport, global_step: int, stop: StopRequest) -> bool:
        """Log the losses of the student's present weights.

        Args:
            name: first part of the tags, such as "validation".
            report: the logs.
            global_step: the step that they are logged at.
            stop: this rank's stop request.

        Returns:
            False, on every rank, when one was asked to stop before the end.
        """
        if not self._stream.num_validation_records:
            return True
        batches = self._stream.validation_batches(self._batch_size, self._max_records)
        # Its batches have sizes of their own, each of which would be compiled.
        with torch.compiler.set_stance("force_eager"):
            losses = validation_losses(self._step, batches, self._accelerator, stop)
        if losses is None:
            return False
        tags = loss_tags(self._stream.teacher_ids, f"{PREFIX}/{name}")
        report.write(global_step, dict(zip(tags, losses, strict=True)))
        return True


@torch.no_grad()
def validation_losses(
    step: DistillationStep,
    batches: Iterable[JoinedBatch],
    accelerator: Accelerator,
    stop: StopRequest,
) -> list[float] | None:
    """Return mean loss, floor and teacher losses over all ranks' validation records.

    None, on every rank, when one of them was asked to stop: this may take many minutes.

    Args:
        step: holds the student.
        batches: this rank's share; ranks may have different numbers of them, even none.
        accelerator: adds the ranks' sums.
        stop: this rank's stop request.
    """
    # The last entries count records and ranks that stop, so that one reduction is enough.
    totals = torch.zeros(4 + len(step.weights), dtype=torch.float64, device=step.device)
    for batch in batches:
        if stop.requested:
            break
        totals[:-2] += step.losses(batch.to(step.device)).sums()
        totals[-2] += len(batch)
    totals[-1] = float(stop.requested)
    *sums, num_records, num_stopped = sum_over_ranks(accelerator, totals).tolist()
    return None if num_stopped else [each / max(num_records, 1) for each in sums]
