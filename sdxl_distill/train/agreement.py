"""Agreement: what all ranks decide together at a step's end, by one small reduction.

It starts when the gradients are there and is read when the optimizer's work is already queued,
so that on a GPU no rank waits for more than the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator

from sdxl_distill.runtime.device import HostCopy


def sum_over_ranks(accelerator: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
    """Return the elementwise sum of all ranks' tensors, on every rank; a GPU only starts it."""
    return cast("torch.Tensor", accelerator.reduce(tensor, reduction="sum"))


@dataclass(frozen=True)
class Verdict:
    """Whether any rank was asked to stop, and whether any met NaN or infinity."""

    stop: bool
    is_finite: bool


class Agreement:
    """Reductions over all ranks, one at a time: `ask`, then `answer`."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._flags: HostCopy | None = None

    def ask(self, stop: bool, numbers: torch.Tensor) -> None:
        """Start the reduction; `numbers` are on the device and should be finite."""
        # Filled, not copied from the host: such a copy would wait for all that is queued.
        stops = torch.full((), float(stop), device=numbers.device)
        flags = torch.stack([stops, (~numbers.isfinite()).any().float()])
        self._flags = HostCopy(sum_over_ranks(self._accelerator, flags))

    def answer(self) -> Verdict:
        """Wait for the reduction and return what all ranks agree on."""
        assert self._flags is not None
        stop, num_bad = self._flags.result().tolist()
        return Verdict(stop=stop > 0, is_finite=num_bad == 0)
