"""The moving average of the student: each rank keeps a share of it, beside the model or in memory.

Following 2.6 billion weights at every step would cost a CPU more than the step costs a GPU. So
each weight is followed once in `ema_every` steps, with the decays of the steps since multiplied,
and every step follows another part: the work is the same at each. Where the weights are on a GPU
and the average is not, a thread does it while the GPU takes the next step.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch

from sdxl_distill.errors import IncompatibleError
from sdxl_distill.optimizer.bounded_groups import bounded_groups
from sdxl_distill.optimizer.stochastic_rounding import join_master

_MAX_MOVE = 0.1
"""The largest share of the way to a weight that waits for an average to be followed later."""
_CPU_PIECE_ELEMENTS = 1 << 18  # what a core's cache holds
_MAX_ELEMENTS = 1 << 25


def ema_decay_at(step: int, ema_decay: float) -> float:
    """Return min(ema_decay, (1 + step) / (10 + step)).

    Without the ramp a decay of 0.9999 would export the starting model after a short run.
    """
    return min(ema_decay, (1 + step) / (10 + step))


def interval_at(step: int, ema_decay: float, ema_every: int) -> int:
    """Return after how many steps a weight is followed again.

    That is `ema_every` once the decay is warm; before, so few that the average moves by about a
    tenth of its distance at once. A pure function, so that a resumed run goes on alike.
    """
    waiting = _MAX_MOVE / (1.0 - ema_decay_at(step, ema_decay))
    return max(1, min(ema_every, int(waiting)))


def is_followed(step: int, phase: int, ema_decay: float, ema_every: int) -> bool:
    """Whether the weights of a phase (from 0, below `ema_every`) are followed after a step."""
    return (step - phase) % interval_at(step, ema_decay, ema_every) == 0


def decay_since(step: int, phase: int, ema_decay: float, ema_every: int) -> float:
    """Return the product of the decays of all steps since a phase was last followed.

    Args:
        step: the step after which the phase is followed now; its decay is included.
        phase: the phase.
        ema_decay: the decay after warm-up.
        ema_every: the interval after warm-up.
    """
    decay = ema_decay_at(step, ema_decay)
    for earlier in range(step - 1, -1, -1):
        if is_followed(earlier, phase, ema_decay, ema_every):
            break
        decay *= ema_decay_at(earlier, ema_decay)
    return decay


def even_parts(sizes: Mapping[str, int], num_parts: int) -> dict[str, int]:
    """Divide named sizes into parts of nearly equal sums: the largest first, to the least part.

    Source: Graham, "Bounds on multiprocessing timing anomalies" (1969), longest first.

    Returns:
        The number of its part for each name, from 0; the same on every rank.
    """
    sums = [(0, part) for part in range(num_parts)]
    parts: dict[str, int] = {}
    for name in sorted(sizes, key=lambda each: (-sizes[each], each)):
        total, part = heapq.heappop(sums)
        parts[name] = part
        heapq.heappush(sums, (total + sizes[name], part))
    return parts


class FollowedWeight(NamedTuple):
    """One of the weights that an average follows.

    Attributes:
        name: its name in the student.
        weight: the weight as the model holds it, any floating dtype.
        remainder: the 16 bits that a bfloat16 weight lacks of its float32 value, of its shape
            (`stochastic_rounding.split_master`); None where the weight is all there is.
    """

    name: str
    weight: torch.Tensor
    remainder: torch.Tensor | None = None

    def beside(self, device: torch.device) -> FollowedWeight:
        """Return it on a device, in its own dtype, which has fewer bytes than its float32 value.

        From a GPU to main memory this only starts the copy.
        """
        remainder = self.remainder
        if remainder is not None:
            remainder = remainder.to(device, non_blocking=True)
        return FollowedWeight(self.name, self.weight.to(device, non_blocking=True), remainder)

    def exact(self) -> torch.Tensor:
        """Return its float32 value."""
        if self.remainder is None:
            return self.weight.to(torch.float32)
        return join_master(self.weight, self.remainder)


class Ema:
    """One rank's share of the average of named parameters; float32, on any device.

    Attributes:
        owners: the rank that keeps each parameter's average.
        averages: this rank's share of them.

    Args:
        parameters: name and tensor of each; their present values are the start.
        ema_decay: the decay after warm-up, in [0, 1).
        device: the averages' device; None keeps each average on its parameter's device.
        ema_every: number of steps after which each weight is followed again, once warm.
        rank: the rank whose share this is.
        num_ranks: number of ranks that share the work.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.Tensor]],
        ema_decay: float,
        device: torch.device | None = None,
        *,
        ema_every: int = 1,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.ema_decay = ema_decay
        self.ema_every = ema_every
        weights = dict(parameters)
        self.owners = even_parts({name: each.numel() for name, each in weights.items()}, num_ranks)
        own = {name: each for name, each in weights.items() if self.owners[name] == rank}
        # Dividing a rank's own share makes the work of its steps even, however it was shared out.
        self._phases = even_parts({name: each.numel() for name, each in own.items()}, ema_every)
        self._shapes = {name: tuple(each.shape) for name, each in weights.items()}
        self.averages = {
            name: parameter.detach().to(device or parameter.device, torch.float32, copy=True)
            for name, parameter in own.items()
        }

    @torch.no_grad()
    def update(self, weights: Iterable[FollowedWeight], step: int) -> None:
        """Move the averages whose turn it is towards their weights after step `step` (from 0).

        Waits for the copy where a weight is on a GPU and its average is not, else for nothing.

        Args:
            weights: all weights; those of other ranks and other phases are passed over.
            step: number of the optimizer step.
        """
        phases: dict[int, list[FollowedWeight]] = {}
        for each in weights:
            phases.setdefault(self._phases.get(each.name, -1), []).append(each)
        for phase in range(self.ema_every):
            if is_followed(step, phase, self.ema_decay, self.ema_every):
                decay = decay_since(step, phase, self.ema_decay, self.ema_every)
                self._follow(phases.get(phase, []), decay)

    def load(self, averages: Mapping[str, torch.Tensor]) -> None:
        """Replace this rank's averages by saved ones.

        Args:
            averages: the averages of all parameters.

        Raises:
            IncompatibleError: when names or shapes differ.
        """
        found = {name: tuple(tensor.shape) for name, tensor in averages.items()}
        expected = self._shapes
        if found != expected:
            differing = sorted(
                name
                for name in found.keys() | expected.keys()
                if found.get(name) != expected.get(name)
            )
            raise IncompatibleError(
                f"{len(differing)} averages of other names or shapes, first {differing[0]!r}",
                expected="those of this student",
                where="EMA",
                action="resume with the student that the checkpoint was made with",
            )
        for name, average in self.averages.items():
            average.copy_(averages[name])

    def _follow(self, weights: Iterable[FollowedWeight], decay: float) -> None:
        # All beside the averages at once would double the memory.
        for group in bounded_groups(weights, lambda each: each.weight.numel(), _MAX_ELEMENTS):
            averages = [self.averages[each.name] for each in group]
            source, device = group[0].weight.device, averages[0].device
            copies = [each.beside(device) for each in group]
            if source.type == "cuda" and device.type == "cpu":
                torch.cuda.current_stream(source).synchronize()
            if device.type == "cpu":
                for average, copy in zip(averages, copies, strict=True):
                    _follow_in_pieces(average, copy, decay)
            else:
                values = [copy.exact() for copy in copies]
                torch._foreach_lerp_(averages, values, 1.0 - decay)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def _follow_in_pieces(average: torch.Tensor, followed: FollowedWeight, decay: float) -> None:
    """Move an average towards a weight, so that its float32 value never leaves the cache."""
    name, weight, remainder = followed
    tensors = [average, weight.detach()] + ([] if remainder is None else [remainder])
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = [tensor.view(-1) for tensor in tensors]
    num_rows = max(1, _CPU_PIECE_ELEMENTS * tensors[0].shape[0] // average.numel())
    for target, *parts in zip(*(tensor.split(num_rows) for tensor in tensors), strict=True):
        target.lerp_(FollowedWeight(name, *parts).exact(), 1.0 - decay)


class BackgroundAverage:
    """Updates an average; in a thread where the weights are on a GPU and the average is not.

    Args:
        ema: the average. Nothing else may read it between `start` and `finish`.
        device: the weights' device.
        num_threads: processor cores that the thread may use: launchers set one for the process.
    """

    def __init__(self, ema: Ema, device: torch.device, num_threads: int = 1) -> None:
        self._ema = ema
        self._device = device
        self._update: Future[None] | None = None
        self._pool: ThreadPoolExecutor | None = None
        if device.type == "cuda" and any(
            average.device.type != "cuda" for average in ema.averages.values()
        ):
            # The number of OpenMP threads is a property of the thread that sets it.
            self._pool = ThreadPoolExecutor(
                1, "average", initializer=partial(torch.set_num_threads, num_threads)
            )
            self._side = torch.cuda.Stream(device)

    def start(self, weights: Iterable[FollowedWeight], step: int) -> None:
        """Begin to follow the weights after optimizer step `step`.

        Args:
            weights: all weights; must not change until `finish`.
            step: number of the optimizer step, from 0.
        """
        if self._pool is None:
            self._ema.update(weights, step)
            return
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        self._update = self._pool.submit(self._follow, weights, step, ready)

    def finish(self) -> None:
        """Wait for the update that was started; raises what failed in it."""
        if self._update is not None:
            self._update.result()
            self._update = None

    def _follow(
        self, weights: Iterable[FollowedWeight], step: int, ready: torch.cuda.Event
    ) -> None:
        self._side.wait_event(ready)
        with torch.cuda.stream(self._side):
            self._ema.update(weights, step)
