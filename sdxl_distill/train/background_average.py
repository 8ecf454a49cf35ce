"""The moving average in main memory, updated by a thread while the GPU takes the next step.

Copying 2.6 billion weights from a GPU and averaging them on a CPU takes about as long as a step;
here it costs the loop nothing as long as it is done before the optimizer changes the weights again.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from sdxl_distill.core.ema import Ema


class BackgroundAverage:
    """Updates an average; in a thread where the weights are on a GPU and the average is not.

    Args:
        ema: the average. Nobody else may look at it between `start` and `finish`.
        device: of the weights.
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
            step: from 0.
        """
        if self._pool is None:
            self._ema.update(weights, step)
            return
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        self._update = self._pool.submit(self._follow, weights, step, ready)

    def finish(self) -> None:
        """Wait until the average has all that was started; raises what went wrong there."""
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
