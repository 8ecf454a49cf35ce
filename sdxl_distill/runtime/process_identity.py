"""What tells one process from every other, on this host, after a reboot and in containers."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sdxl_distill.storage.fsio import new_token

BEAT_SECONDS: Final = 15.0
"""Time between two signs of life that a process gives to others that cannot see it."""
EXPIRY_SECONDS: Final = 120.0
"""A process without a sign of life for this long, on the observer's own clock, is dead or hangs."""


@dataclass(frozen=True)
class ProcessIdentity:
    """What tells one process from every other, even after its pid was reused."""

    boot_id: str
    pid_namespace: str
    pid: int
    start_ticks: int

    @classmethod
    def current(cls) -> ProcessIdentity:
        """Return the identity of this process.

        Where there is no /proc the boot id is a unique one, so that only the unchanged
        heartbeat tells whether the process is dead.
        """
        pid = os.getpid()
        try:
            boot_id = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
            namespace = str(Path("/proc/self/ns/pid").readlink())
        except FileNotFoundError:
            return cls(new_token(), "", pid, 0)
        return cls(boot_id, namespace, pid, _start_ticks(pid) or 0)

    def is_neighbour(self, observer: ProcessIdentity) -> bool:
        """Whether the observer, on the same host, could see this process."""
        here = (observer.boot_id, observer.pid_namespace)
        return (self.boot_id, self.pid_namespace) == here

    def is_gone(self, observer: ProcessIdentity) -> bool:
        """Whether the observer, on the same host, can see that this process has ended."""
        with suppress(PermissionError):  # /proc may hide the processes of other users (hidepid)
            return self.is_neighbour(observer) and _start_ticks(self.pid) != self.start_ticks
        return False


def _start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks after boot; None when it has ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in brackets, may hold spaces and brackets; after it come state … start time.
    state, *rest = status.rpartition(")")[2].split()
    return None if state in {"Z", "X"} else int(rest[18])
