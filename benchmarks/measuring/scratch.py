"""Where benchmarks keep their files: below benchmarks/, on the disk of the repository."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_READ_BYTES = 4 << 20


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give an empty folder that is removed afterwards."""
    parent = Path(__file__).parents[1] / ".scratch"
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Path(folder)


def read_all(paths: Sequence[Path]) -> int:
    """Read files from begin to end into one buffer of 4 MiB and return the number of bytes.

    The fastest of the usual sizes: a larger buffer falls out of the processor's cache.
    """
    buffer = memoryview(bytearray(_READ_BYTES))
    num_bytes = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while num_read := file.readinto(buffer):
                num_bytes += num_read
    return num_bytes
