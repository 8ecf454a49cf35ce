"""How much main memory this process may still take: less than the machine has, in containers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sdxl_distill.runtime.control_groups import control_groups, lines

_ROOT: Final = Path("/")


def free_memory(root: Path = _ROOT) -> int | None:
    """Return how many bytes of main memory all processes here may still take together.

    What the page cache holds counts as free, since the kernel gives it up. None where the kernel
    does not say.

    Args:
        root: the folder that holds `proc` and `sys`; tests pass another one.
    """
    available = [*_available(root), *_left_in_groups(root)]
    return min(available, default=None)


def _available(root: Path) -> Iterator[int]:
    """Yield the kernel's own estimate (https://docs.kernel.org/filesystems/proc.html)."""
    for line in lines(root / "proc/meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            yield int(rest.split()[0]) << 10


def _left_in_groups(root: Path) -> Iterator[int]:
    for group in control_groups("memory", root):
        limit = _number(group / "memory.max", group / "memory.limit_in_bytes")
        used = _number(group / "memory.current", group / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            yield max(0, limit - used + _page_cache(group))


def _page_cache(group: Path) -> int:
    """Return the bytes of a group that hold files; version 1 names those of its children apart."""
    numbers = dict(line.split()[:2] for line in lines(group / "memory.stat") if " " in line)
    names = ("total_inactive_file", "total_active_file")
    if names[0] not in numbers:
        names = ("inactive_file", "active_file")
    return sum(int(numbers.get(name, 0)) for name in names)


def _number(*paths: Path) -> int | None:
    """Return the number in the first file that holds one; "max" is none."""
    for path in paths:
        for line in lines(path):
            if line.isdigit():
                return int(line)
    return None
