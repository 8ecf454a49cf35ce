"""The launcher that started this rank, and what happens when it is killed."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

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
