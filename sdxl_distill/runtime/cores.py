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
    """Yield the processors that each control group above this process grants, if it limits them.

    A line of `/proc/self/cgroup` is `id:controllers:path`; without controllers it is version 2
    (https://docs.kernel.org/admin-guide/cgroup-v2.html). In a container the path may be
    the host's, of which only the mounted end exists: missing folders are skipped.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = (controllers, "cpu", "cpu,cpuacct") if controllers else ("", "unified")
        for mount in dict.fromkeys(mounts):
            group = root / "sys/fs/cgroup" / mount
            parts = [part for part in path.split("/") if part not in ("", "..")]
            for depth in range(len(parts) + 1):
                yield from _quota_of(group.joinpath(*parts[:depth]))


def _quota_of(group: Path) -> Iterator[float]:
    """Yield quota over period of one group; nothing if it has no quota."""
    numbers = " ".join(_lines(group / "cpu.max")).split()  # version 2: "max 100000"
    if not numbers:
        numbers = _lines(group / "cpu.cfs_quota_us") + _lines(group / "cpu.cfs_period_us")
    with suppress(ValueError, ZeroDivisionError):
        quota, period = map(int, numbers)
        if quota > 0:  # version 1 writes -1 for no limit
            yield quota / period


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
