"""The image folder while it is read: whether it is still the one that reading began with.

An image that is gone is one bad image; an unmounted folder makes all of its images look so. A
mount point keeps its path, so device and inode are compared.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from sdxl_distill.errors import StorageError
from sdxl_distill.storage.regular_file import storage_errors

_GONE: Final = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENOTCONN}
_ACTION: Final = "mount it again or put it back, then run again; committed work is kept"

Identity = tuple[int, int]


class ImageFolder:
    """Remembers device and inode of a folder, and of the mount points below it.

    Args:
        path: the folder; it may be missing, and then so is everything in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identities: dict[str, Identity | None] = {"": _identity(path)}

    def watch(self, mounts: Iterable[str]) -> None:
        """Remember folders that lie on other devices than the folder itself.

        Args:
            mounts: their paths relative to the folder, with slashes.

        Raises:
            StorageError: when one of them is not mounted here.
        """
        root = self._identities[""]
        for folder in mounts:
            found = _identity(self.path / folder)
            if found is None or root is None or found[0] == root[0]:
                raise self._vanished(folder)
            self._identities[folder] = found

    def require_there(self, source: str) -> None:
        """Check the folders that an image lies in, when it is not found.

        Args:
            source: the image's path, relative to the folder.

        Raises:
            StorageError: when one is gone or was replaced by another.
        """
        for folder, before in self._identities.items():
            if folder and not source.startswith(f"{folder}/"):
                continue
            if before is None or _identity(self.path / folder) != before:
                raise self._vanished(folder)

    def _vanished(self, folder: str) -> StorageError:
        return StorageError(
            "the image folder is gone, or not the one that was scanned",
            expected="the same folder on the same device",
            where=str(self.path / folder),
            action=_ACTION,
        )


def all_gone(num_images: int, where: str) -> StorageError:
    """Return the error for a shard none of whose images are there."""
    return StorageError(
        f"none of the {num_images} images of a shard is there any more",
        expected="the images that the catalog knows",
        where=where,
        action=f"{_ACTION}. If they were deleted for good: build_latents --rebuild",
    )


def _identity(path: Path) -> Identity | None:
    with storage_errors(path):
        try:
            status = path.stat()
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise
    return status.st_dev, status.st_ino
