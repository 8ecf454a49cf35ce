"""Signals that ask to stop."""

from __future__ import annotations

import os
import signal

import pytest

from sdxl_distill.errors import Preempted
from sdxl_distill.runtime.stop_request import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_and_nothing_more(number: int) -> None:
    with StopRequest().listening() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested


def test_afterwards_the_signals_mean_what_they_meant() -> None:
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    with pytest.raises(ZeroDivisionError), StopRequest().listening():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before


def test_who_checks_is_stopped_only_when_it_was_asked_for() -> None:
    stop = StopRequest()
    stop.check("toy")
    stop.request()
    with pytest.raises(Preempted, match="toy"):
        stop.check("toy")
