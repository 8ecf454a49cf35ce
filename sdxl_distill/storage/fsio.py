"""The only writer of durable bytes: a directory held by handle, files that appear whole.

A name is published create-only: temporary file → fsync → link, or what else the volume offers →
fsync directory. A second writer changes nothing (docs/decisions/0002-create-only-publication.md).
The handle is opened before the directory is looked at, so a writer that slept through the
directory's withdrawal writes into the withdrawn one, never into its successor.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Hashable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

from sdxl_distill.errors import ConfigError, StorageError
from sdxl_distill.storage.path_text import require_path
from sdxl_distill.storage.publication import Staged, Volume, exchange, is_refusal
from sdxl_distill.storage.random_access import Descriptor
from sdxl_distill.storage.regular_file import (
    LostDirectoryError,
    in_use,
    not_regular,
    open_regular,
    read_bytes,
    storage_errors,
)
from sdxl_distill.storage.staged_file import StagedFile

TEMPORARY_PREFIX = ".tmp-"
_BLOCK_BYTES = 1 << 20
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}


def new_token() -> str:
    """Return 32 random hex digits: the name of one worker or one temporary file's owner."""
    return secrets.token_hex(16)


class Directory:
    """A directory held open by handle; every operation goes through the handle.

    Args:
        path: the directory; must exist unless `create`.
        create: make it and its parents first.
        token: owner of the temporary files staged here; 32 hex digits.
        exclusive: the promise of a single worker, as `Volume` takes it.
        parent: the directory that contains it, through whose handle it is opened.

    Raises:
        ConfigError: when it does not exist, or cannot be a path.
        StorageError: when it cannot be made or opened.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        create: bool = False,
        token: str | None = None,
        exclusive: bool = False,
        parent: Directory | None = None,
    ) -> None:
        self.path = Path(path)
        self.token = token or new_token()
        self.parent = parent
        self._numbers = count(1)  # safe to draw from in many threads
        self.descriptor = self._opened(create)
        is_same_volume = parent is not None and self._device() == parent._device()
        self.volume = parent.volume if parent and is_same_volume else Volume(exclusive=exclusive)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.name

    def folder(self, name: str) -> Directory:
        """Open a folder in this one, through its handle; make it if it is missing.

        It has the same owner and, on the same file system, the same volume.

        Raises:
            StorageError: when it cannot be made or opened.
        """
        _check_name(name)
        exclusive = self.volume.exclusive
        return Directory(
            self.path / name, create=True, token=self.token, exclusive=exclusive, parent=self
        )

    def make_again(self) -> None:
        """Make a folder again that `folder` opened and that was removed since.

        It is made in its parent, wherever that is now. The outermost folder is never made again:
        work on a set that was withdrawn must not go into its successor.

        Raises:
            StorageError: when the parent is gone too, or refuses.
        """
        if self.parent is not None:
            self.parent.make_again()
            descriptor = self._opened(create=True)
            os.dup2(descriptor, self.descriptor, inheritable=False)  # for all threads at once
            os.close(descriptor)

    def _opened(self, create: bool) -> int:
        if self.parent is not None:
            name, parent = self.path.name, self.parent
            with in_use(self.path):
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=parent.descriptor)
                return os.open(name, _FOLDER_FLAGS, dir_fd=parent.descriptor)
        require_path(self.path)
        with storage_errors(self.path):
            if create:
                self.path.mkdir(parents=True, exist_ok=True)
            try:
                return os.open(self.path, _FOLDER_FLAGS)
            except FileNotFoundError as error:
                raise ConfigError(
                    "there is no such folder", where=str(self.path), action="check the path"
                ) from error

    def is_in_place(self) -> bool:
        """Whether the folder's name still stands for the folder that was opened.

        Raises:
            StorageError: when the operating system refuses to say.
        """
        with storage_errors(self.path):
            try:
                return os.path.samestat(self.path.stat(), os.fstat(self.descriptor))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
                return False

    def sync(self) -> None:
        """Flush the folder's names to the disk, as far as the file system can do so."""
        try:
            os.fsync(self.descriptor)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise

    def _device(self) -> int:
        with in_use(self.path):
            return os.fstat(self.descriptor).st_dev

    def close(self) -> None:
        """Close the handle; the object must not be used afterwards."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def stage(self) -> StagedFile:
        """Open a new temporary file of this owner, to be filled and published."""
        with in_use(self.path):
            return StagedFile(
                self.descriptor, f"{TEMPORARY_PREFIX}{self.token}-{next(self._numbers)}"
            )

    def publish(self, staged: StagedFile, name: str) -> bool:
        """Give a staged file its name, create-only. True: made; False: the name existed.

        Raises:
            LostDirectoryError: when the temporary file or the directory is gone.
            StorageError: when the disk is full or refuses.
        """
        _check_name(name)
        with in_use(self.path):
            staged.seal()
            made = self.volume.publish(
                Staged(self.descriptor, staged.temporary_name, staged.file.fileno()),
                name,
                str(self.path),
            )
            self.sync()
        return made

    def publish_bytes(self, name: str, content: bytes) -> bool:
        """Publish `content` under `name`, create-only. True: made; False: the name existed."""
        with self.stage() as staged:
            with in_use(self.path):
                staged.file.write(content)
            return self.publish(staged, name)

    def replace_bytes(self, name: str, content: bytes) -> None:
        """Give `name` new content in one step; readers see the old or the new, never a mix."""
        _check_name(name)
        with self.stage() as staged, in_use(self.path):
            staged.file.write(content)
            staged.seal()
            self._rename_over(staged.temporary_name, name)
            self.sync()

    def swap_bytes(self, name: str, content: bytes, max_bytes: int) -> bytes | None:
        """Give `name` new content in one step and return what it had; None: it did not exist.

        Many writers may swap at once and lose nothing: each content is returned to one of them
        or stays. Where the file system cannot exchange names, as on NFS, this is a read and a
        rename, and what another writer puts there between the two is lost.

        Raises:
            CorruptError: when `name` is not a regular file, or larger than `max_bytes`.
            StorageError: as `publish`.
        """
        with self.stage() as staged:
            with in_use(self.path):
                staged.file.write(content)
            if self.publish(staged, name):
                return None
            with in_use(self.path):
                before = self.read(name, max_bytes)
                if exchange(self.descriptor, staged.temporary_name, name):
                    before = self.read(staged.temporary_name, max_bytes)
                else:
                    self._rename_over(staged.temporary_name, name)
                self.sync()
        return before

    def link_from(self, source: Directory, name: str) -> bool:
        """Give a file of another folder its name here too, create-only.

        Returns:
            True: the name is that file's now, or was before. False: another file has it, or this
            file cannot be linked: the file system has no links, or another user owns it.

        Raises:
            StorageError: when there is no such file.
        """
        _check_name(name)
        with in_use(self.path):
            try:
                os.link(name, name, src_dir_fd=source.descriptor, dst_dir_fd=self.descriptor)
            except FileExistsError:
                return os.path.samestat(source._status(name), self._status(name))
            except OSError as error:
                if is_refusal(error):
                    return False
                raise
            self.sync()
        return True

    def copy_from(self, source: Directory, name: str) -> bool:
        """Publish a copy of another folder's file under its name, compared before it counts.

        Returns:
            True: the name has these bytes now, or had them before. False: it has others.

        Raises:
            FileNotFoundError: when there is no such file.
            StorageError: when the disk is full or refuses, or returns other bytes.
        """
        with os.fdopen(source._open(name), "rb") as original:
            if not self.exists(name) and self._copy(original, name):
                return True
            with os.fdopen(self._open(name), "rb") as existing, in_use(self.path):
                return _same_content(original, existing)

    def _copy(self, original: BinaryIO, name: str) -> bool:
        with self.stage() as staged:
            with in_use(self.path):
                shutil.copyfileobj(original, staged.file, _BLOCK_BYTES)
                staged.seal()
                if not _same_content(original, staged.file):
                    raise StorageError(
                        "the disk returns bytes other than those that were written",
                        where=str(self.path / name),
                        action="check the disk",
                    )
            return self.publish(staged, name)

    def exists(self, name: str) -> bool:
        """Whether anything has this name."""
        with in_use(self.path):
            try:
                self._status(name)
            except FileNotFoundError:
                return False
            return True

    def names(self) -> set[str]:
        """Return every name in the directory, temporary ones included."""
        with in_use(self.path):
            # A new descriptor: duplicates share one position in the listing, so two threads that
            # list at once would each miss what the other saw.
            descriptor = os.open(".", _FOLDER_FLAGS, dir_fd=self.descriptor)
            try:
                return set(os.listdir(descriptor))
            finally:
                os.close(descriptor)

    def where(self, name: str = "") -> str:
        """Return where the folder or a file in it lies, for messages."""
        return f"{self.path}/{name}" if name else str(self.path)

    def open(self, name: str, where: str | None = None) -> Descriptor:
        """Open a regular file as `open_regular`; `FileNotFoundError` when it does not exist.

        It is closed as a context, or when the last reference to it is gone.
        """
        del where  # what is read by handle is not opened again
        return Descriptor(self._open(name))

    def num_bytes(self, name: str) -> int | None:
        """Return the size of a regular file, whatever is in it; None when it does not exist.

        Raises:
            CorruptError: when it is not a regular file.
            StorageError: when the operating system refuses.
        """
        status = self._status_of_target(name)
        if status is not None and not stat.S_ISREG(status.st_mode):
            raise not_regular(self.where(name))
        return None if status is None else status.st_size

    def version(self, name: str) -> Hashable:
        """Return what no two contents of a name share, if none is written in place; None: absent.

        Raises:
            StorageError: when the operating system refuses.
        """
        status = self._status_of_target(name)
        return status and (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def read(self, name: str, max_bytes: int) -> bytes:
        """Read a whole regular file as `read_bytes`; `FileNotFoundError` when it is missing."""
        _check_name(name)
        return read_bytes(name, max_bytes, self.descriptor)

    def rewrite(self, name: str, content: bytes) -> bool:
        """Rewrite a small file in place: over NFS others see it at their next open.

        Returns:
            False when the file or this folder is gone.

        Raises:
            StorageError: when the disk is full or refuses.
        """
        _check_name(name)
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with suppress(LostDirectoryError), in_use(self.path):
            descriptor = os.open(name, flags, dir_fd=self.descriptor)
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                file.write(content)
            return True
        return False

    def remove(self, name: str) -> None:
        """Remove `name`; do nothing if another process already did, or took the folder."""
        _check_name(name)
        with suppress(LostDirectoryError), in_use(self.path):
            os.unlink(name, dir_fd=self.descriptor)

    def _rename_over(self, temporary_name: str, name: str) -> None:
        os.rename(temporary_name, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def _open(self, name: str) -> int:
        _check_name(name)
        return open_regular(name, self.descriptor)

    def _status_of_target(self, name: str) -> os.stat_result | None:
        _check_name(name)
        with storage_errors(self.where(name)), suppress(FileNotFoundError):
            return os.stat(name, dir_fd=self.descriptor)
        return None

    def _status(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)


def _check_name(name: str) -> None:
    assert Path(name).name == name, name


def _same_content(left: BinaryIO, right: BinaryIO) -> bool:
    left.seek(0)
    right.seek(0)
    while block := left.read(_BLOCK_BYTES):
        if right.read(len(block)) != block:
            return False
    return not right.read(1)
