"""How a volume lets a name appear at most once: found by trying it there, at the first publication.

A volume is what one folder shows of a file system. Each publication asks its `Volume`, so no caller
can forget to try; the folders opened in a folder share it. An object store fits behind the
same door.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from typing import NamedTuple

from sdxl_distill.errors import StorageError

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
# The answers of file systems that have no links, or no such rename: vfat and exFAT say EPERM and
# EINVAL, FUSE, SMB and NFS one of the others. EXDEV and EMLINK are limits that some set on links.
_REFUSALS = frozenset(
    {
        errno.EPERM,
        errno.EACCES,
        errno.EINVAL,
        errno.ENOTSUP,
        errno.EOPNOTSUPP,
        errno.ENOSYS,
        errno.EMLINK,
        errno.EXDEV,
    }
)


class Publication(Enum):
    """How a file system lets a name appear at most once."""

    LINK = "link"
    RENAME_NOREPLACE = "renameat2"
    RENAME = "rename"  # looks before it renames: for one exclusive worker


class Staged(NamedTuple):
    """A temporary file that is to become a name in its folder."""

    directory: int
    """Descriptor of the folder."""
    name: str
    """Its present name."""
    descriptor: int
    """Descriptor of the open file: tells it from others after it was renamed."""


class Volume:
    """One volume, and how it publishes.

    Args:
        exclusive: the user promises that one worker alone publishes here, so that a file system
            without create-only names can be used too.
        publication: the way it publishes; None: to be found out.
    """

    def __init__(self, *, exclusive: bool = False, publication: Publication | None = None) -> None:
        self.exclusive = exclusive
        self.publication = publication
        self._lock = threading.Lock()

    def publish(self, staged: Staged, name: str, where: str) -> bool:
        """Give a file its name, create-only. True: made; False: the name existed.

        Raises:
            StorageError: when the volume has no way to do so, and no promise was made.
            OSError: when it refuses for another reason.
        """
        with self._lock:
            if self.publication is None:
                self.publication = _found_at(staged) or self._promised(where)
        return _publish(self.publication, staged, name)

    def _promised(self, where: str) -> Publication:
        if self.exclusive:
            return Publication.RENAME
        raise StorageError(
            "this file system can neither link a file nor rename it without replacing another",
            expected="hard links or renameat2(RENAME_NOREPLACE)",
            where=where,
            action="use another file system, or set cache.exclusive and run one process",
        )


def exchange(directory: int, left: str, right: str) -> bool:
    """Exchange two names of a folder in one step; False when the volume has no such step."""
    try:
        _renameat2(directory, left, right, _RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return False
    return True


def is_refusal(error: OSError) -> bool:
    """Whether a volume says that it does not link this file, rather than that a disk is broken."""
    return error.errno in _REFUSALS


def _found_at(staged: Staged) -> Publication | None:
    """Try which way works, next to a file that is about to be published."""
    for publication in (Publication.LINK, Publication.RENAME_NOREPLACE):
        if _makes_names_once(publication, staged):
            return publication
    return None


def _makes_names_once(publication: Publication, staged: Staged) -> bool:
    # Named after a temporary file, so that they are swept with their owner's.
    target = f"{staged.name}-probe"
    with _empty_file(staged, "first") as first, _empty_file(staged, "second") as second:
        try:
            return _publish(publication, first, target) and not (
                _publish(publication, second, target)
            )
        except OSError as error:
            if not is_refusal(error):
                raise
            return False
        finally:
            with suppress(FileNotFoundError):
                os.unlink(target, dir_fd=staged.directory)


@contextmanager
def _empty_file(staged: Staged, name: str) -> Iterator[Staged]:
    path = f"{staged.name}-{name}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600, dir_fd=staged.directory)
    try:
        yield Staged(staged.directory, path, descriptor)
    finally:
        os.close(descriptor)
        with suppress(FileNotFoundError):
            os.unlink(path, dir_fd=staged.directory)


def _publish(publication: Publication, staged: Staged, name: str) -> bool:
    directory, temporary, _ = staged
    try:
        if publication is Publication.LINK:
            os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        elif publication is Publication.RENAME_NOREPLACE:
            _renameat2(directory, temporary, name, _RENAME_NOREPLACE)
        elif _is_there(directory, name):
            return _has_name(staged, name)
        else:
            os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except (FileExistsError, FileNotFoundError) as error:
        # When a network repeats a call whose answer was lost, a link says that the name exists
        # and a rename that the temporary file does not: the file itself tells.
        if _has_name(staged, name):
            return True
        if isinstance(error, FileNotFoundError):
            raise
        return False
    return True


def _has_name(staged: Staged, name: str) -> bool:
    try:
        existing = os.stat(name, dir_fd=staged.directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(staged.descriptor), existing)


def _is_there(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _renameat2(directory: int, source: str, target: str, flag: int) -> None:
    """Rename inside a folder; ENOSYS where the C library does not know how."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = errno.ENOSYS
    if hasattr(libc, "renameat2"):
        names = os.fsencode(source), os.fsencode(target)
        if not libc.renameat2(directory, names[0], directory, names[1], flag):
            return
        number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))
