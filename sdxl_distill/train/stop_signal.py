"""The wish to stop: SIGTERM or SIGUSR1 at any rank, acted upon at a step boundary by all."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal:
    """Remembers that this process was asked to stop."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Catch the signals within the block; afterwards they mean what they meant before."""
        previous = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
