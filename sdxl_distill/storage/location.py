"""The location of a cache's folder: everything that is done to the folder itself, by its name.

Its content is read through a `Folder` and written through a `Directory`. A location is a local path
today; the URL of an object store fits behind the same methods.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import total_ordering
from pathlib import Path

from sdxl_distill.storage.folder import FolderByPath
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.path_text import real_path, require_path
from sdxl_distill.storage.regular_file import storage_errors


@total_ordering
class Location:
    """A folder by its name; it need not exist.

    Args:
        text: its path, or another location of the same folder.

    Raises:
        ConfigError: when the text cannot be a path.
    """

    def __init__(self, text: str | Path | Location) -> None:
        if not isinstance(text, Location):
            require_path(text)
        self._path = text._path if isinstance(text, Location) else Path(text)

    def __str__(self) -> str:
        return str(self._path)

    def __repr__(self) -> str:
        return f"Location({str(self)!r})"

    def __hash__(self) -> int:
        return hash(self._path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Location) and self._path == other._path

    def __lt__(self, other: Location) -> bool:
        return self._path < other._path

    def __truediv__(self, name: str) -> Location:
        return Location(self._path / name)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self._path.name

    @property
    def parent(self) -> Location:
        """The folder that contains it."""
        return Location(self._path.parent)

    def real(self) -> Location:
        """Return the location that links lead to, as far as it exists: a withdrawal renames it."""
        return Location(real_path(self._path))

    def seen_from(self, other: Location) -> str:
        """Return the relative path, with `/`, that leads here from another location."""
        # Not Path.resolve: this may be a link to itself, which is refused when it is opened.
        return Path(os.path.relpath(str(self.real()), str(other.real()))).as_posix()

    def exists(self) -> bool:
        """Whether anything has this name."""
        return self._path.exists()

    def is_folder(self) -> bool:
        """Whether a folder has this name."""
        return self._path.is_dir()

    def look(self) -> FolderByPath:
        """Return the folder to be read by its name."""
        return FolderByPath(str(self))

    def open(self, *, create: bool = False, exclusive: bool = False) -> Directory:
        """Open the folder by handle, to write or list it; arguments and errors as `Directory`."""
        return Directory(self._path, create=create, exclusive=exclusive)

    def folders(self) -> list[str]:
        """Return the names of the folders in this one, sorted; none where it does not exist.

        Raises:
            StorageError: when it cannot be listed.
        """
        if not self.is_folder():
            return []
        with storage_errors(str(self)), os.scandir(self._path) as entries:
            # A listing tells folders apart: no status of each of many shards is asked for.
            return sorted(entry.name for entry in entries if entry.is_dir())

    def siblings(self, prefix: str) -> list[Location]:
        """Return what lies next to it under a name with this prefix, sorted."""
        parent = self._path.parent
        if not parent.is_dir():
            return []
        return sorted(Location(each) for each in parent.iterdir() if each.name.startswith(prefix))

    def renamed(self, name: str) -> Location:
        """Return the location with another last part."""
        return Location(self._path.with_name(name))

    def rename(self, target: Location, *, missing_ok: bool = False) -> None:
        """Give a folder another name in one step, on the disk when this returns.

        Args:
            target: the new name; its parent is made when it is missing.
            missing_ok: do nothing when another process removed or renamed the folder before.

        Raises:
            StorageError: when it does not exist, or the operating system refuses.
        """
        with Directory(target.parent._path, create=True) as parent, storage_errors(str(self)):
            try:
                self._path.rename(target._path)
            except FileNotFoundError:
                if not missing_ok:
                    raise
            parent.sync()

    def make(self) -> None:
        """Make an empty folder, on the disk when this returns; its parents too.

        Raises:
            StorageError: when it exists already, or the operating system refuses.
        """
        with Directory(self.parent._path, create=True) as parent, storage_errors(str(self)):
            self._path.mkdir()
            parent.sync()

    def remove(self) -> None:
        """Remove the folder with all that is in it, as far as that is possible."""
        shutil.rmtree(self._path, ignore_errors=True)

    def remove_own(self, folders: Collection[str], is_own: Callable[[str], bool]) -> None:
        """Remove some of its folders and files, and the folder itself if nothing else is in it.

        Args:
            folders: the names of the folders that go with all that is in them.
            is_own: the function that says whether a file of this name is to be removed.

        Raises:
            StorageError: when the operating system refuses.
        """
        # All workers of a launch may do this at once: what one finds gone, another removed.
        with storage_errors(str(self)), suppress(FileNotFoundError):
            for folder in folders:
                (self / folder).remove()
            for each in self._path.iterdir():
                if is_own(each.name):
                    each.unlink(missing_ok=True)
            with suppress(OSError):  # not empty: foreign files, or a zombie that still writes
                self._path.rmdir()
