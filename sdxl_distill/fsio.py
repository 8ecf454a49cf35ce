"""The only writer of durable bytes: a directory held by handle, files that appear whole.

A name is published create-only: temporary file → fsync → link → fsync directory → unlink. Who
comes second is told so and changes nothing (docs/decisions/0002-create-only-publication.md).
The handle is opened before the directory is looked at, so a writer that slept through the
directory's withdrawal writes into the withdrawn one, never into its successor.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from itertools import count
from pathlib import Path
from typing import BinaryIO

from sdxl_distill.errors import ConfigError, CorruptError, StorageError

TEMPORARY_PREFIX = ".tmp-"
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_GONE = {errno.ENOENT, errno.ESTALE}


class LostDirectoryError(StorageError):
    """The temporary file or its directory was removed by somebody: drop the unit, look anew."""


class Publication(Enum):
    """How a file system lets a name appear at most once."""

    LINK = "link"
    RENAME_NOREPLACE = "renameat2"
    RENAME = "rename"  # not create-only: allowed for one exclusive worker


@contextmanager
def storage_errors(where: str | Path) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError that says where and what to do."""
    try:
        yield
    except OSError as error:
        raise _storage_error(error, str(where)) from error


def _storage_error(error: OSError, where: str) -> StorageError:
    actions = {
        errno.ENOSPC: "free some space on this disk and run again; committed work is kept",
        errno.EDQUOT: "free some of your quota and run again; committed work is kept",
        errno.EROFS: "choose a folder on a disk that can be written",
        errno.EACCES: "give this user the right to read and write there, or choose another folder",
        errno.ENOENT: "check the path; something may have removed it while it was in use",
        errno.ENOTDIR: "check the path; a file stands where a folder should",
    }
    reason = os.strerror(error.errno) if error.errno else str(error)
    action = actions.get(error.errno or 0, "check the disk or the mount, then run again")
    return StorageError(reason, where=where, action=action)


def new_token() -> str:
    """Return 32 random hex digits: the name of one worker or one temporary file's owner."""
    return secrets.token_hex(16)


def open_regular(path: str | Path, dir_fd: int | None = None) -> int:
    """Open a regular file for reading and return its descriptor; never hangs on a FIFO.

    Raises:
        FileNotFoundError: when nothing has that name.
        CorruptError: when it is a FIFO, a device, a socket or a folder.
        StorageError: when the operating system refuses.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _storage_error(error, str(path)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptError(
            "is no regular file",
            expected="a regular file",
            where=str(path),
            action="remove it, or run the builder with its folder repaired",
        )
    return descriptor


def read_bytes(path: str | Path, max_bytes: int, dir_fd: int | None = None) -> bytes:
    """Read a whole regular file of at most `max_bytes`, checked before memory is taken.

    Raises:
        FileNotFoundError, CorruptError, StorageError: as `open_regular`; CorruptError also
            when the file is larger.
    """
    descriptor = open_regular(path, dir_fd)
    with os.fdopen(descriptor, "rb") as file, storage_errors(path):
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise CorruptError(
                f"{size} bytes", expected=f"at most {max_bytes} bytes", where=str(path)
            )
        return file.read(max_bytes + 1)


class StagedFile:
    """A temporary file that becomes a name when published, and vanishes otherwise."""

    def __init__(self, directory: Directory, temporary_name: str) -> None:
        self.directory = directory
        self.temporary_name = temporary_name
        descriptor = os.open(
            temporary_name,
            os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC,
            0o666,  # less what the umask takes
            dir_fd=directory.descriptor,
        )
        self.file: BinaryIO = os.fdopen(descriptor, "w+b")

    def seal(self) -> None:
        """Flush every byte to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(self, *_exception: object) -> None:
        with suppress(OSError):
            self.file.close()
        with suppress(OSError):
            os.unlink(self.temporary_name, dir_fd=self.directory.descriptor)


class Directory:
    """A directory held open by handle; every operation goes through the handle.

    Args:
        path: the directory; must exist unless `create`.
        create: make it and its parents first.
        token: owner of the temporary files staged here; 32 hex digits.

    Raises:
        ConfigError: when it does not exist.
        StorageError: when it cannot be made or opened.
    """

    def __init__(self, path: str | Path, *, create: bool = False, token: str | None = None) -> None:
        self.path = Path(path)
        self.token = token or new_token()
        self.publication = Publication.LINK
        self._numbers = count(1)  # safe to draw from in many threads
        with storage_errors(self.path):
            if create:
                self.path.mkdir(parents=True, exist_ok=True)
            try:
                self.descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise ConfigError(
                    "there is no such folder", where=str(self.path), action="check the path"
                ) from error

    def close(self) -> None:
        """Give the handle back; the object is of no use afterwards."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def stage(self) -> StagedFile:
        """Open a new temporary file of this owner, to be filled and published."""
        with self._errors():
            return StagedFile(self, f"{TEMPORARY_PREFIX}{self.token}-{next(self._numbers)}")

    def publish(self, staged: StagedFile, name: str) -> bool:
        """Give a staged file its name, create-only. True: made; False: the name existed.

        Raises:
            LostDirectoryError: when the temporary file or the directory is gone.
            StorageError: when the disk is full or refuses.
        """
        _check_name(name)
        with self._errors():
            staged.seal()
            made = self._publish_sealed(staged.temporary_name, name)
            os.fsync(self.descriptor)
        return made

    def publish_bytes(self, name: str, content: bytes) -> bool:
        """Publish `content` under `name`, create-only. True: made; False: the name existed."""
        with self.stage() as staged:
            with self._errors():
                staged.file.write(content)
            return self.publish(staged, name)

    def replace_bytes(self, name: str, content: bytes) -> None:
        """Give `name` new content in one step; readers see the old or the new, never a mix."""
        _check_name(name)
        with self.stage() as staged, self._errors():
            staged.file.write(content)
            staged.seal()
            self._rename_over(staged.temporary_name, name)
            os.fsync(self.descriptor)

    def swap_bytes(self, name: str, content: bytes, max_bytes: int) -> bytes | None:
        """Give `name` new content in one step and return what it had; None: it was not there.

        What many writers swap is lost by none of them: each content is returned to one of them
        or stays. Where the file system cannot exchange names, as NFS, this is a look and a
        rename, and what comes between the two is lost.

        Raises:
            CorruptError: when `name` is no regular file, or larger than `max_bytes`.
            StorageError: as `publish`.
        """
        with self.stage() as staged:
            with self._errors():
                staged.file.write(content)
            if self.publish(staged, name):
                return None
            with self._errors():
                before = self.read(name, max_bytes)
                if _rename(self.descriptor, staged.temporary_name, name, _RENAME_EXCHANGE):
                    before = self.read(staged.temporary_name, max_bytes)
                else:
                    self._rename_over(staged.temporary_name, name)
                os.fsync(self.descriptor)
        return before

    def link_from(self, source: Directory, name: str) -> bool:
        """Give a file of another folder its name here too, create-only.

        Returns:
            True: the name is that file's now, or was before. False: another file has it.

        Raises:
            StorageError: when there is no such file, or it cannot be linked.
        """
        _check_name(name)
        with self._errors():
            try:
                os.link(name, name, src_dir_fd=source.descriptor, dst_dir_fd=self.descriptor)
            except FileExistsError:
                return os.path.samestat(source._status(name), self._status(name))
            os.fsync(self.descriptor)
        return True

    def exists(self, name: str) -> bool:
        """Whether `name` is there, whatever it is."""
        with self._errors():
            try:
                self._status(name)
            except FileNotFoundError:
                return False
            return True

    def names(self) -> set[str]:
        """Return every name in the directory, temporary ones included."""
        with self._errors():
            return set(os.listdir(self.descriptor))

    def open(self, name: str) -> int:
        """Open a regular file as `open_regular`; `FileNotFoundError` when it is not there."""
        _check_name(name)
        return open_regular(name, self.descriptor)

    def read(self, name: str, max_bytes: int) -> bytes:
        """Read a whole regular file as `read_bytes`; `FileNotFoundError` when not there."""
        _check_name(name)
        return read_bytes(name, max_bytes, self.descriptor)

    def remove(self, name: str) -> None:
        """Remove `name`; nothing happens when somebody else already did."""
        _check_name(name)
        with self._errors(), suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def probe_publication(self, *, exclusive: bool = False) -> None:
        """Find out how this file system makes a name at most once, before any work is done.

        Args:
            exclusive: the user promises that this is the only worker, so that a file system
                without create-only names can be used too.

        Raises:
            StorageError: when it has no way and `exclusive` is off.
        """
        name = f"{TEMPORARY_PREFIX}{self.token}-probe"
        for publication in (Publication.LINK, Publication.RENAME_NOREPLACE):
            self.publication = publication
            try:
                with self.stage() as first, self.stage() as second, self._errors():
                    if self._publish_sealed(first.temporary_name, name) and not (
                        self._publish_sealed(second.temporary_name, name)
                    ):
                        return
            except StorageError as error:
                cause = error.__cause__
                if not isinstance(cause, OSError) or cause.errno not in _NO_HARD_LINKS | {
                    errno.EINVAL
                }:
                    raise
            finally:
                self.remove(name)
        if not exclusive:
            raise StorageError(
                "this file system can neither link a file nor rename it without replacing",
                expected="hard links or renameat2(RENAME_NOREPLACE)",
                where=str(self.path),
                action="use another file system, or set cache.exclusive and run one process",
            )
        self.publication = Publication.RENAME

    def _publish_sealed(self, temporary_name: str, name: str) -> bool:
        directory = self.descriptor
        if self.publication is Publication.RENAME:
            self._rename_over(temporary_name, name)
            return True
        try:
            if self.publication is Publication.LINK:
                os.link(temporary_name, name, src_dir_fd=directory, dst_dir_fd=directory)
            else:
                _rename_noreplace(directory, temporary_name, name)
        except FileExistsError:
            # A retried link over NFS says EEXIST after it worked: the inode tells.
            return self._same_file(temporary_name, name)
        return True

    def _rename_over(self, temporary_name: str, name: str) -> None:
        os.rename(temporary_name, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def _same_file(self, left: str, right: str) -> bool:
        try:
            return os.path.samestat(self._status(left), self._status(right))
        except FileNotFoundError:
            return False

    def _status(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _GONE:
                raise LostDirectoryError(
                    "a temporary file or the folder itself was removed while in use",
                    where=str(self.path),
                    action="run again; committed work is kept",
                ) from error
            raise _storage_error(error, str(self.path)) from error


def _check_name(name: str) -> None:
    assert Path(name).name == name, name


def _rename_noreplace(directory: int, source: str, target: str) -> None:
    if not _rename(directory, source, target, _RENAME_NOREPLACE):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def _rename(directory: int, source: str, target: str, flag: int) -> bool:
    """Rename by `renameat2`; False when kernel or file system does not know the flag."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(directory, source.encode(), directory, target.encode(), flag):
        number = ctypes.get_errno()
        if number in (errno.EINVAL, errno.ENOSYS):
            return False
        raise OSError(number, os.strerror(number))
    return True
