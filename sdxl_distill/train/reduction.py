"""The one collective of the training loop: a sum over all ranks."""

from __future__ import annotations

from typing import cast

import torch
from accelerate import Accelerator


def sum_over_ranks(accelerator: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
    """Return the elementwise sum of every rank's tensor, on every rank; starts it on a GPU."""
    return cast("torch.Tensor", accelerator.reduce(tensor, reduction="sum"))
