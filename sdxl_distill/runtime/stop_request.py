"""A request to stop early: SIGTERM or SIGUSR1, or a part of the work that failed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from sdxl_distill.errors import Preempted


class StopRequest:
    """Remembers that this process is to stop; a plain flag, safe to set in a signal handler."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested = False

    def request(self, *_: object) -> None:
        """Ask to stop; also a signal handler."""
        self.requested = True

    def check(self, where: str) -> None:
        """Raise Preempted, naming what is being worked on, when asked to stop."""
        if self.requested:
            raise Preempted(
                "asked to stop",
                where=where,
                action="run the same command again; committed work is kept",
            )

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Listen to the signals within the block; main thread only."""
        before = {number: signal.signal(number, self.request) for number in self.SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
