"""Losses on images that are never trained on, for the student and for its average."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from sdxl_distill.runtime.stop_request import StopRequest
from sdxl_distill.stream.batch import JoinedBatch
from sdxl_distill.train.agreement import sum_over_ranks
from sdxl_distill.train.ema import Ema
from sdxl_distill.train.step import DistillationStep


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


@contextmanager
def averaged_weights(
    student: nn.Module, ema: Ema | None, accelerator: Accelerator
) -> Iterator[None]:
    """Give every rank's student the moving average's weights within the block.

    Args:
        student: this rank's student; its own weights wait in main memory meanwhile.
        ema: the main rank's average; None on the other ranks.
        accelerator: carries the average to the other ranks.
    """
    own = {
        name: weight.detach().to("cpu", copy=True) for name, weight in student.named_parameters()
    }
    try:
        with torch.no_grad():
            for name, weight in student.named_parameters():
                if ema is not None:
                    weight.copy_(ema.averages[name])
                if accelerator.num_processes > 1:
                    broadcast(weight.detach())
        yield
    finally:
        with torch.no_grad():
            for name, weight in student.named_parameters():
                weight.copy_(own[name])
