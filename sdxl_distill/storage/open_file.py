"""Files read by position, and how many of them this process keeps open at once.

A join of many teachers has thousands of shards in use, but a process may have only 1,024
descriptors. So a file is open while there is room; it is closed when others need its descriptor,
and opened again when it is next read. All sets share one budget, which leaves some for the rest.
"""

from __future__ import annotations

import errno
import resource
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, TypeVar

from sdxl_distill.errors import CorruptError, StorageError
from sdxl_distill.storage.random_access import Descriptor

T = TypeVar("T")

MOST_OPEN: Final = 65_536
"""The most files kept open: each takes about a kilobyte of the kernel's memory."""

_RESERVE: Final = 512
"""Descriptors left for sockets, logs, checkpoints and libraries; half of a low limit."""

_TOO_MANY: Final = {errno.EMFILE, errno.ENFILE}


class OpenFile:
    """A file that is read by position; safe to share between threads.

    Args:
        open_it: the function that opens it for reading and returns the descriptor; called again
            if the file had to be closed meanwhile.
        where: the file's name in errors.
        files: the files it shares descriptors with; None means all files of this process.

    Attributes:
        num_bytes: the size of the file when it was first opened.

    Raises:
        FileNotFoundError, CorruptError, StorageError: whatever `open_it` raises; StorageError
            also when no descriptor is available.
    """

    def __init__(
        self, open_it: Callable[[], int], where: str, files: OpenFiles | None = None
    ) -> None:
        self._open_it = open_it
        self._where = where
        self._files = files or OPEN_FILES
        self._descriptor: Descriptor | None = None
        self._is_recent = True
        self.num_bytes = self._open().num_bytes

    def read_into(self, buffers: Sequence[memoryview], offset: int, *, wait: bool = True) -> int:
        """Fill buffers from `offset` on by one call of the system; return how many bytes came.

        Args:
            buffers: writable bytes of any sizes.
            offset: the position in the file.
            wait: False returns only what is in the page cache, possibly nothing.

        Raises:
            OSError: as `os.preadv`.
            CorruptError, StorageError: as the constructor, when it had to be opened again; also
                when another file has taken its place.
        """
        descriptor = self._descriptor or self._open_again()
        self._is_recent = True
        return descriptor.read_into(buffers, offset, wait=wait)

    def prefetch(self, offset: int, num_bytes: int) -> None:
        """Let the disk start on what `read_into` will ask for."""
        descriptor = self._descriptor or self._open_again()
        descriptor.prefetch(offset, num_bytes)

    def let_go(self) -> bool:
        """Close the file once no thread reads it, unless it was read since the last call."""
        if self._is_recent:
            self._is_recent = False
            return False
        self._descriptor = None
        return True

    def _open(self) -> Descriptor:
        descriptor = Descriptor(self._files.with_room(self._open_it))
        self._descriptor = descriptor
        self._files.admit(self)
        return descriptor

    def _open_again(self) -> Descriptor:
        try:
            descriptor = self._open()
        except FileNotFoundError as error:
            raise CorruptError("is missing", expected="a file", where=self._where) from error
        num_bytes = descriptor.num_bytes
        if num_bytes != self.num_bytes:
            raise CorruptError(
                f"{num_bytes} bytes", expected=f"{self.num_bytes} bytes", where=self._where
            )
        return descriptor


class OpenFiles:
    """Files that share descriptors: the least recently read ones are closed for others.

    Args:
        most_open: the number kept open at once; None takes what this process's limit allows.
    """

    def __init__(self, most_open: int | None = None) -> None:
        self._most_open = most_open
        self._lock = threading.Lock()
        self._files: deque[weakref.ref[OpenFile]] = deque()

    @property
    def most_open(self) -> int:
        """The number of files kept open at once; the first call raises this process's limit."""
        if self._most_open is None:
            limit = raise_limit(MOST_OPEN + _RESERVE)
            self._most_open = max(1, limit - min(_RESERVE, limit // 2))
        return self._most_open

    def admit(self, file: OpenFile) -> None:
        """Count a file that was opened, and close others when there are too many."""
        with self._lock:
            self._files.append(weakref.ref(file))
            while len(self._files) > self.most_open:
                self._close_one()

    def with_room(self, open_it: Callable[[], T]) -> T:
        """Return `open_it()`; where descriptors have run out, close some files and try again.

        Raises:
            StorageError: when there is none left to close.
        """
        while True:
            try:
                return open_it()
            except (OSError, StorageError) as error:
                # Not `error` itself in a variable: it would hold all frames in a cycle, and with
                # them whatever networks a caller has loaded.
                cause = _shortage(error)
                if cause is None:
                    raise
                if not self._make_room():
                    raise _too_many_open(cause) from error

    def _make_room(self) -> bool:
        """Close half of the files; False when none is open."""
        with self._lock:
            num_kept = len(self._files) // 2
            has_closed = bool(self._files)
            while len(self._files) > num_kept:
                self._close_one()
        return has_closed

    def _close_one(self) -> None:
        """Close the first file that was not read since it was last looked at (CLOCK)."""
        while self._files:
            file = self._files.popleft()
            held = file()
            if held is None or held.let_go():
                return
            self._files.append(file)


def raise_limit(num_wanted: int) -> int:
    """Raise this process's limit of descriptors as far as it is allowed to; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = num_wanted if hard == resource.RLIM_INFINITY else min(hard, num_wanted)
    if soft == resource.RLIM_INFINITY:
        return num_wanted
    if soft < highest:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
            soft = highest
    return soft


def _shortage(error: OSError | StorageError) -> OSError | None:
    """Return the system's own error when descriptors have run out; None for any other."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return cause if isinstance(cause, OSError) and cause.errno in _TOO_MANY else None


def _too_many_open(error: OSError) -> StorageError:
    if error.errno == errno.ENFILE:
        return StorageError(
            "the machine has too many open files",
            where=str(error.filename),
            action="close other programs, or raise the kernel's fs.file-max, then run again",
        )
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return StorageError(
        f"no more files can be opened: this process may open {limit}, and all are in use",
        expected=f"at least {limit + _RESERVE}",
        where=str(error.filename),
        action=f"run `ulimit -n {max(4096, 2 * limit)}` in the shell before the command (in a "
        "container --ulimit nofile=…, in a unit LimitNOFILE=…), then run again",
    )


OPEN_FILES: Final = OpenFiles()
"""The files of this process."""
