"""What SIGINT, SIGTERM and SIGUSR1 mean to a run, from its start-up to its export.

While steps are taken the first is remembered until it is safe to save; before and after, when
there is nothing to save, it ends the run by KeyboardInterrupt. A second Ctrl-C means at once.
A thread watches too, since Python's own handlers wait for PyTorch, which may wait for other ranks.
"""

from __future__ import annotations

import ctypes
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from sdxl_distill.runtime.stop_request import StopRequest

SIGNALS: Final = (signal.SIGINT, *StopRequest.SIGNALS)
# Some launchers forward the signal that the terminal has already sent to the whole group.
_SAME_PRESS_SECONDS: Final = 0.5
_UNWIND_SECONDS: Final = 3.0


class StopSignals:
    """Listens to the signals that end a run.

    Args:
        on_remembered: called by a thread when the run will stop after the present step.
        on_abandoned: called by a thread when this process ends without unwinding, because it
            does not answer; returns the exit code.

    Attributes:
        request: set by the first signal.
        at_once: true after a second one, which does not wait for a checkpoint.
    """

    def __init__(
        self,
        on_remembered: Callable[[], None] = lambda: None,
        on_abandoned: Callable[[], int] = lambda: 130,
    ) -> None:
        self.request = StopRequest()
        self.at_once = False
        self._on_remembered = on_remembered
        self._on_abandoned = on_abandoned
        self._is_deferring = False
        self._presses = _Presses()

    @contextmanager
    def listening(self) -> Iterator[StopSignals]:
        """Listen within the block; main thread only.

        Raises:
            KeyboardInterrupt: inside the block, at a signal that is not remembered.
        """
        received, written = os.pipe()
        os.set_blocking(written, False)
        watcher = threading.Thread(target=self._watch, args=(received,), daemon=True)
        heard = [number for number in SIGNALS if not _is_not_meant(number)]
        before = {number: signal.signal(number, self._obey) for number in heard}
        descriptor = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        watcher.start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(written)
            watcher.join()
            os.close(received)

    @contextmanager
    def deferred(self) -> Iterator[StopRequest]:
        """Within the block only remember the first signal; the work there checks for it.

        Raises:
            KeyboardInterrupt: when a signal came before.
        """
        self._is_deferring = True
        try:
            self.check()
            yield self.request
        finally:
            self._is_deferring = False

    def check(self) -> None:
        """Raise KeyboardInterrupt when a signal came that nothing has obeyed yet."""
        if self.request.requested:
            raise KeyboardInterrupt

    def _obey(self, number: int, _frame: object) -> None:
        is_first = not self._presses.num_signals
        if self._presses.insist(number):
            self.at_once = True
            raise KeyboardInterrupt
        self.request.request()
        # An ending that has begun is not disturbed by another polite request.
        if is_first and not self._is_deferring:
            raise KeyboardInterrupt

    def _watch(self, received: int) -> None:
        presses = _Presses()
        patience_seconds: float | None = None
        while True:
            ready, _, _ = select.select([received], [], [], patience_seconds)
            if not ready:
                os._exit(self._on_abandoned())
            number = os.read(received, 1)
            if not number:
                return
            if number[0] not in SIGNALS:  # another part of the process listens to it
                continue
            is_first = not presses.num_signals
            self.at_once |= presses.insist(number[0])
            self.request.request()
            if self.at_once or not self._is_deferring:
                patience_seconds = _UNWIND_SECONDS
            elif is_first:
                self._on_remembered()


def _is_not_meant(number: int) -> bool:
    """Whether a shell started this in the background of a script, whose Ctrl-C is not for it."""
    return number == signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN


class _Presses:
    """The signals that one observer saw, and whether the last of them insists."""

    def __init__(self) -> None:
        self.num_signals = 0
        self._first_interrupt_seconds: float | None = None

    def insist(self, number: int) -> bool:
        """Count one signal; whether it is Ctrl-C for the second time.

        An elastic launcher forwards the first Ctrl-C as it is and the second one as SIGTERM.
        """
        self.num_signals += 1
        now = time.monotonic()
        first = self._first_interrupt_seconds
        if number == signal.SIGINT and first is None:
            self._first_interrupt_seconds = now
            return False
        again = number == signal.SIGINT or (number == signal.SIGTERM and is_under_launcher())
        return again and first is not None and now - first > _SAME_PRESS_SECONDS


_PR_SET_PDEATHSIG = 1  # prctl(2)
_SHUTDOWN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
_USUAL_SHUTDOWN_SECONDS = 30.0

_log = logging.getLogger(__name__)


def is_under_launcher() -> bool:
    """Whether an elastic launcher (torchrun, accelerate with several processes) started this."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def warn_of_short_shutdown(checkpoint_seconds: float) -> None:
    """Warn when the launcher would kill the ranks before they can save a checkpoint.

    At Ctrl-C and SIGTERM it forwards the signal, and kills what has not ended in time.
    """
    if not is_under_launcher():
        return
    try:
        shutdown_seconds = float(os.environ[_SHUTDOWN_VARIABLE])
    except (KeyError, ValueError):
        shutdown_seconds = _USUAL_SHUTDOWN_SECONDS
    if 2 * checkpoint_seconds > shutdown_seconds:
        _log.warning(
            "a checkpoint took %.0f s, and the launcher kills its processes %.0f s after Ctrl-C or "
            "SIGTERM: to have a stopped run saved, launch it with %s=%.0f",
            checkpoint_seconds,
            shutdown_seconds,
            _SHUTDOWN_VARIABLE,
            max(600.0, 10 * checkpoint_seconds),
        )


def end_with_launcher() -> None:
    """Have this rank killed when the elastic launcher that started it dies.

    A launcher that is killed outright cannot end its ranks: they would train on, hold their GPUs
    and write into the folder of the run that is resumed. Linux only. A plain `python` may
    outlive its shell.
    """
    if sys.platform == "linux" and is_under_launcher():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
