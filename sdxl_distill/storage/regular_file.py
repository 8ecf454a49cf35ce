"""Regular files, read whole or opened, with the operating system's refusals as our errors.

A file that another machine replaced over NFS is opened again; one that is larger than its
reader allows takes no memory; a FIFO or a device in its place never hangs.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from sdxl_distill.errors import CorruptError, StorageError

T = TypeVar("T")

_GONE = {errno.ENOENT, errno.ESTALE}


class LostDirectoryError(StorageError):
    """Another process removed the temporary file or its directory: drop the unit and look again."""


@contextmanager
def storage_errors(where: str | Path) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError that says where and what to do."""
    try:
        yield
    except OSError as error:
        raise _storage_error(error, str(where)) from error


@contextmanager
def in_use(where: str | Path) -> Iterator[None]:
    """As `storage_errors`; a file that vanishes in the block raises LostDirectoryError."""
    try:
        yield
    except OSError as error:
        raise _error_in_use(error, str(where)) from error


def _error_in_use(error: OSError, where: str) -> StorageError:
    if error.errno not in _GONE:
        return _storage_error(error, where)
    return LostDirectoryError(
        "a file or its folder was removed while in use",
        where=where,
        action="run again; committed work is kept",
    )


def _storage_error(error: OSError, where: str) -> StorageError:
    actions = {
        errno.ENOSPC: "free some space on this disk and run again; committed work is kept",
        errno.EDQUOT: "free some of your quota and run again; committed work is kept",
        errno.EROFS: "choose a folder on a writable disk",
        errno.EACCES: "let this user read and write in that folder, or choose another one",
        errno.ENOENT: "check the path; something may have removed it while it was in use",
        errno.ENOTDIR: "check the path; a file stands where a folder should",
        errno.EEXIST: "check the path; a file or a broken link stands where a folder should",
        errno.ELOOP: "check the path; a link in it leads back to itself",
    }
    reason = os.strerror(error.errno) if error.errno else str(error)
    action = actions.get(error.errno or 0, "check the disk or the mount, then run again")
    return StorageError(reason, where=where, action=action)


def open_regular(path: str | Path, dir_fd: int | None = None) -> int:
    """Open a regular file for reading and return its descriptor; never hangs on a FIFO.

    Raises:
        FileNotFoundError: when nothing has that name.
        CorruptError: when it is a FIFO, a device, a socket or a folder.
        StorageError: when the operating system refuses.
    """
    with _reading_errors(path):
        return _unless_stale(lambda: _open_regular(path, dir_fd))


def _open_regular(path: str | Path, dir_fd: int | None) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device that does not exist
            raise not_regular(path) from error
        raise
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    raise not_regular(path)


def not_regular(path: str | Path) -> CorruptError:
    """Return the error for a FIFO, a device, a socket or a folder in the place of a file."""
    return CorruptError(
        "is not a regular file",
        expected="a regular file",
        where=str(path),
        action="remove it; if it belongs to a set, run the builder once with --repair",
    )


def read_bytes(path: str | Path, max_bytes: int, dir_fd: int | None = None) -> bytes:
    """Read a whole regular file of at most `max_bytes`, checked before memory is taken.

    Raises:
        FileNotFoundError, CorruptError, StorageError: as `open_regular`; CorruptError also
            when the file is larger, or grows while it is read.
    """

    def read() -> bytes:
        with os.fdopen(_open_regular(path, dir_fd), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise CorruptError(
                    f"{size} bytes", expected=f"at most {max_bytes} bytes", where=str(path)
                )
            content = file.read(size + 1)
            if len(content) > size:
                raise CorruptError("grew while it was being read", where=str(path))
            return content

    with _reading_errors(path):
        return _unless_stale(read)


def _unless_stale(read: Callable[[], T]) -> T:
    """Return `read()`; retry where NFS finds that the file was replaced meanwhile."""
    try:
        return read()
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
    return read()


@contextmanager
def _reading_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _error_in_use(error, str(path)) from error
