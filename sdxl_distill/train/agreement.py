"""What all ranks decide alike at a step's end, by one small reduction and without a stall.

The question is asked when the gradients are there and answered when the optimizer's work is
already queued, so that on a GPU nobody waits for more than the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from sdxl_distill.train.reduction import sum_over_ranks


@dataclass(frozen=True)
class Verdict:
    """Whether any rank was asked to stop, and whether any met NaN or infinity."""

    stop: bool
    is_finite: bool


class Agreement:
    """One question to all ranks at a time."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._flags: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def ask(self, stop: bool, numbers: torch.Tensor) -> None:
        """Start the reduction; `numbers` are on the device and should be finite."""
        flags = torch.stack(
            [torch.tensor(float(stop), device=numbers.device), (~numbers.isfinite()).any().float()]
        )
        flags = sum_over_ranks(self._accelerator, flags)
        if flags.is_cuda:
            self._flags = torch.empty(2, pin_memory=True).copy_(flags, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._flags = flags

    def answer(self) -> Verdict:
        """Wait for the reduction and return what all ranks agree on."""
        assert self._flags is not None
        if self._copied is not None:
            self._copied.synchronize()
        stop, num_bad = self._flags.tolist()
        return Verdict(stop=stop > 0, is_finite=num_bad == 0)
