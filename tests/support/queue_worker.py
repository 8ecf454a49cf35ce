"""A worker of one process at the claims on a set, with a clock that goes when told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdxl_distill.builder.heartbeat import Timing
from sdxl_distill.builder.work_queue import WorkQueue
from sdxl_distill.storage.fsio import Directory

TIMING = Timing(heartbeat_seconds=15, expiry_seconds=120, straggler_factor=3, poll_seconds=0.01)
UNITS = [f"set-64x64-{number:06d}" for number in range(6)]


class Clock:
    """A clock that goes when told."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@contextmanager
def worker(
    path: Path, clock: Clock | None = None, timing: Timing = TIMING
) -> Iterator[tuple[Directory, WorkQueue]]:
    with (
        Directory(path, create=True) as directory,
        WorkQueue(directory, timing, clock=clock or time.monotonic) as queue,
    ):
        yield directory, queue


def commit(directory: Directory, unit: str) -> None:
    directory.publish_bytes(f"{unit}.idx", b"")


def claims(path: Path) -> set[str]:
    return {place.name for place in (path / ".build" / "claims").iterdir()}
