"""The moving average in main memory, updated by a thread while the GPU takes the next step.

Copying 2.6 billion weights from a GPU and averaging them on a CPU takes about as long as a step;
here it costs the loop nothing as long as it is done before the optimizer changes the weights again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from sdxl_distill.errors import IncompatibleError
from sdxl_distill.optimizer.bounded_groups import bounded_groups

_MAX_ELEMENTS = 1 << 25


def ema_decay_at(step: int, ema_decay: float) -> float:
    """Return min(ema_decay, (1 + step) / (10 + step)).

    Without the ramp a decay of 0.9999 would export the starting model after a short run.
    """
    return min(ema_decay, (1 + step) / (10 + step))


class Ema:
    """The average of named parameters; float32, on any device.

    Args:
        parameters: name and tensor of each; their present values are the start.
        ema_decay: the decay after warm-up, in [0, 1).
        device: the average's device; None keeps each average on its parameter's device.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.Tensor]],
        ema_decay: float,
        device: torch.device | None = None,
    ) -> None:
        self.ema_decay = ema_decay
        self.averages = {
            name: parameter.detach().to(device or parameter.device, torch.float32, copy=True)
            for name, parameter in parameters
        }

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, torch.Tensor]], step: int) -> None:
        """Move every average towards its parameter after optimizer step `step` (from 0).

        Waits for the copy where a parameter is on a GPU and its average is not, else for nothing.
        """
        rate = 1.0 - ema_decay_at(step, self.ema_decay)
        # All in float32 at once would double the memory.
        for group in bounded_groups(parameters, lambda each: each[1].numel(), _MAX_ELEMENTS):
            averages = [self.averages[name] for name, _ in group]
            # Copied in their own dtype: a bfloat16 weight has half the bytes of its float32 value.
            weights = [
                weight.to(average.device, non_blocking=True)
                for (_, weight), average in zip(group, averages, strict=True)
            ]
            source = group[0][1].device
            if source.type == "cuda" and averages[0].device.type == "cpu":
                torch.cuda.current_stream(source).synchronize()
            weights = [weight.to(torch.float32) for weight in weights]
            torch._foreach_lerp_(averages, weights, rate)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

    def load(self, averages: Mapping[str, torch.Tensor]) -> None:
        """Replace the averages by saved ones.

        Raises:
            IncompatibleError: when names or shapes differ.
        """
        found = {name: tuple(tensor.shape) for name, tensor in averages.items()}
        expected = {name: tuple(tensor.shape) for name, tensor in self.averages.items()}
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
        for name, tensor in averages.items():
            self.averages[name].copy_(tensor)


class BackgroundAverage:
    """Updates an average; in a thread where the weights are on a GPU and the average is not.

    Args:
        ema: the average. Nothing else may read it between `start` and `finish`.
        device: the weights' device.
    """

    def __init__(self, ema: Ema, device: torch.device) -> None:
        self._ema = ema
        self._device = device
        is_apart = any(average.device.type != device.type for average in ema.averages.values())
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="average") if is_apart else None
        self._update: Future[None] | None = None

    def start(self, weights: Iterable[tuple[str, torch.Tensor]], step: int) -> None:
        """Begin to follow the weights after optimizer step `step`.

        Args:
            weights: name and tensor of each; must not change until `finish`.
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
        self, weights: Iterable[tuple[str, torch.Tensor]], step: int, ready: torch.cuda.Event
    ) -> None:
        side = torch.cuda.Stream(self._device)
        side.wait_event(ready)
        with torch.cuda.stream(side):
            self._ema.update(weights, step)
