"""How many processor cores this process may use: fewer than the machine has, in most clusters.

Schedulers pin processes to cores (affinity); containers get a share of their time (cgroup quota).
More threads than that only take turns.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from sdxl_distill.runtime.control_groups import control_groups, lines

_ROOT: Final = Path("/")


def available_cores(root: Path = _ROOT) -> int:
    """Return how many cores this process may use, at least 1.

    Args:
        root: the folder that holds `proc` and `sys`; tests pass another one.
    """
    cores = len(os.sched_getaffinity(0))
    for quota in _quotas(root):
        cores = min(cores, int(quota))
    return max(1, cores)


def _quotas(root: Path) -> Iterator[float]:
    """Yield the processors that each control group above this process grants, if it limits them."""
    for group in control_groups("cpu", root, ("cpu,cpuacct",)):
        yield from _quota_of(group)


def _quota_of(group: Path) -> Iterator[float]:
    """Yield quota over period of one group; nothing if it has no quota."""
    numbers = " ".join(lines(group / "cpu.max")).split()  # version 2: "max 100000"
    if not numbers:
        numbers = lines(group / "cpu.cfs_quota_us") + lines(group / "cpu.cfs_period_us")
    with suppress(ValueError, ZeroDivisionError):
        quota, period = map(int, numbers)
        if quota > 0:  # version 1 writes -1 for no limit
            yield quota / period
