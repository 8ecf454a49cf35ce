"""The launcher that started this rank, and what happens when it is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_launcher() -> None:
    """Have this rank killed when the elastic launcher that started it dies.

    A launcher that is killed outright cannot end its ranks: they would train on, hold their GPUs
    and write into the folder of the run that somebody resumes. Linux only. A plain `python` may
    outlive its shell.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
