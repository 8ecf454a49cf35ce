"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal

import pytest

from sdxl_distill.train.stop_signal import StopSignal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_and_nothing_more(number: int) -> None:
    with StopSignal().listening() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested


def test_afterwards_the_signals_mean_what_they_meant() -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(ZeroDivisionError), StopSignal().listening():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in numbers] == before
