"""Where benchmarks keep their files: below benchmarks/, on the disk of the repository."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_READ_BYTES = 4 << 20
_MALLOC_OFFSET_BYTES = 16


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give an empty folder that is removed afterwards."""
    parent = Path(__file__).parents[1] / ".scratch"
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Path(folder)


def read_all(paths: Sequence[Path], buffer: memoryview) -> int:
    """Read files from begin to end into one buffer, again and again; return the bytes."""
    num_bytes = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while num_read := file.readinto(buffer):
                num_bytes += num_read
    return num_bytes


def read_buffer(*, page_aligned: bool) -> memoryview:
    """Return 4 MiB to read into: larger buffers fall out of the processor's cache.

    malloc, and so `bytearray`, gives large memory 16 bytes after the begin of a page; a copy from
    the page cache to there is much slower than to the begin of one on some processors.
    """
    memory = memoryview(mmap.mmap(-1, _READ_BYTES + mmap.PAGESIZE))
    start = 0 if page_aligned else _MALLOC_OFFSET_BYTES
    return memory[start : start + _READ_BYTES]
