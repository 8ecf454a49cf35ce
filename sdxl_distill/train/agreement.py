"""Agreement: what all ranks decide together at a step's end, by one small reduction.

It starts when the gradients are there and is read when the optimizer's work is already queued,
so that on a GPU no rank waits for more than the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from sdxl_distill.errors import DistillError
from sdxl_distill.runtime.device import HostCopy

# Equal processors have equal bits. Unlike ones round roots otherwise in their last bit, which
# stochastic rounding makes 3e-5 of a bfloat16 weight's norm in 10,000 steps.
_SHARED_TOLERANCE = 1e-4


def sum_over_ranks(accelerator: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
    """Return the elementwise sum of all ranks' tensors, on every rank; a GPU only starts it."""
    return cast("torch.Tensor", accelerator.reduce(tensor, reduction="sum"))


def max_over_ranks(accelerator: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
    """Return the elementwise maximum of all ranks' tensors, on every rank; a GPU only starts it."""
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return tensor


def shared_numbers(grad_norm: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return two numbers that are the same on all ranks as long as their students are.

    The norm of reduced gradients shows a rank that was left out of the reduction. It does not
    show weights that have drifted apart, whose gradients are averaged all the same: for these,
    the sum of a weight in units of its norm, which one missed step moves by about 1e-4. Both are
    such that a difference counts as it is.

    Args:
        grad_norm: global norm of the gradients, float32 scalar.
        weight: one of the weights, any shape and floating dtype.

    Returns:
        float32 [2]: the logarithm of the norm, and the sum.
    """
    tiny = torch.finfo(torch.float32).tiny
    norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.float32)
    total = weight.detach().sum(dtype=torch.float32)
    return torch.stack([grad_norm.clamp(min=tiny).log(), total / norm.clamp(min=tiny)])


def told_by_main(accelerator: Accelerator, ask: Callable[[], str]) -> str:
    """Return on every rank what `ask` returns on the main one, which alone calls it.

    Raises:
        DistillError: on every rank, what `ask` raised on the main one.
    """
    if accelerator.num_processes == 1:
        return ask()
    answer: list[str | DistillError | None] = [None]
    if accelerator.is_main_process:
        try:
            answer = [ask()]
        except DistillError as error:
            answer = [error]
    (told,) = broadcast_object_list(answer)
    if isinstance(told, DistillError):
        raise told
    return str(told)


@dataclass(frozen=True)
class Verdict:
    """What all ranks agree on.

    Attributes:
        stop: whether any rank was asked to stop.
        is_finite: whether no rank met NaN or infinity.
        lowest: the lowest that any rank has of each shared number.
        highest: the highest that any rank has of each shared number.
    """

    stop: bool
    is_finite: bool
    lowest: tuple[float, ...] = ()
    highest: tuple[float, ...] = ()

    @property
    def is_shared(self) -> bool:
        """Whether all ranks have the same shared numbers, but for what other processors round."""
        return all(
            high - low <= _SHARED_TOLERANCE * max(abs(low), abs(high), 1.0)
            for low, high in zip(self.lowest, self.highest, strict=True)
        )


class Agreement:
    """Reductions over all ranks, one at a time: `ask`, then `answer`."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._maxima: HostCopy | None = None

    def ask(self, stop: bool, numbers: torch.Tensor, shared: torch.Tensor) -> None:
        """Start the reduction.

        Args:
            stop: whether this rank was asked to stop.
            numbers: what should be finite, float32 vector on the device.
            shared: what should be the same on all ranks, float32 vector on the device.
        """
        # Filled, not copied from the host: such a copy would wait for all that is queued.
        stops = torch.full((1,), float(stop), device=numbers.device)
        is_bad = (~torch.cat([numbers, shared]).isfinite()).any().float()[None]
        # Of NaN a maximum is anything; that it was there is known already.
        shared = shared.nan_to_num(0.0, 0.0, 0.0)
        maxima = torch.cat([stops, is_bad, shared, -shared])
        self._maxima = HostCopy(max_over_ranks(self._accelerator, maxima))

    def answer(self) -> Verdict:
        """Wait for the reduction and return what all ranks agree on."""
        assert self._maxima is not None
        stop, is_bad, *shared = self._maxima.result().tolist()
        num_shared = len(shared) // 2
        return Verdict(
            stop=stop > 0,
            is_finite=is_bad == 0,
            lowest=tuple(-negated for negated in shared[num_shared:]),
            highest=tuple(shared[:num_shared]),
        )
