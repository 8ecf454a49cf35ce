"""The first signal is obeyed when it is safe, the second Ctrl-C at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from support.patience import PATIENCE_SECONDS, wait_until

from sdxl_distill.train.stop_signals import SIGNALS, StopSignals


def press_twice(second: int = signal.SIGINT) -> None:
    send(signal.SIGINT)
    time.sleep(0.6)
    send(second)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)  # the handler runs within the first moments of it


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_step_a_signal_ends_the_run(number: int) -> None:
    signals = StopSignals()
    with pytest.raises(KeyboardInterrupt), signals.listening():
        send(number)
    assert signals.request.requested
    assert not signals.at_once


@pytest.mark.parametrize("number", SIGNALS)
def test_between_steps_a_signal_is_remembered_and_announced(number: int) -> None:
    announced: list[bool] = []
    signals = StopSignals(lambda: announced.append(True))
    with signals.listening(), signals.deferred() as stop:
        assert not stop.requested
        send(number)
        assert stop.requested
    assert announced == [True]
    with pytest.raises(KeyboardInterrupt):
        signals.check()


def test_the_second_ctrl_c_ends_the_run_at_once() -> None:
    signals = StopSignals()
    with pytest.raises(KeyboardInterrupt), signals.listening(), signals.deferred():
        press_twice()
    assert signals.at_once


def test_one_press_that_arrives_twice_is_one() -> None:
    signals = StopSignals()
    with signals.listening(), signals.deferred():
        send(signal.SIGINT)
        send(signal.SIGINT)
    assert not signals.at_once


def test_sigterm_never_ends_the_saving_unless_a_launcher_says_ctrl_c_again_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signals = StopSignals()
    with signals.listening(), signals.deferred():
        press_twice(signal.SIGTERM)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    signals = StopSignals()
    with pytest.raises(KeyboardInterrupt), signals.listening(), signals.deferred():
        press_twice(signal.SIGTERM)


def test_ctrl_c_is_not_meant_for_a_run_in_the_background_of_a_script() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals().listening() as signals:
            send(signal.SIGINT)
            assert not signals.request.requested
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_something_else_listens_to_stops_nothing() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: heard.append(number))
    try:
        with StopSignals().listening() as signals:
            send(signal.SIGALRM)
            wait_until(lambda: heard)
        assert not signals.request.requested
    finally:
        signal.signal(signal.SIGALRM, before)


def test_afterwards_the_signals_mean_what_they_meant() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), StopSignals().listening():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


DEAF = """
import ctypes
from sdxl_distill.train.stop_signals import StopSignals
signals = StopSignals(on_abandoned=lambda: print("abandoned", signals.at_once, flush=True) or 7)
with signals.listening():
    print("ready", flush=True)
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # for ever, as in a collective whose other ranks are gone
"""


@pytest.mark.multiprocess
def test_a_process_that_waits_outside_python_ends_all_the_same() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 7
        assert process.stdout.read() == "abandoned False\n"
