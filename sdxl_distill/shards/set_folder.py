"""The door to a set's folder: every file by what it is, its size bounded, parsed and checked.

It works on any `Folder`, so that a set in an object store is read by the same code. An absent file
is a `FileNotFoundError`: only the caller knows what that means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, Generic, TypeVar

from sdxl_distill.limits import (
    MAX_INDEX_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_RECORD_BYTES,
    MAX_SET_IDENTITY_BYTES,
)
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import MANIFEST_NAME, Manifest
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.set_identity import SET_IDENTITY_NAME, SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.tar_index import Look, header_of_tar, index_of_tar
from sdxl_distill.storage.folder import Folder
from sdxl_distill.storage.random_access import RandomAccess

EMPTY_RECORD_NAME: Final = "empty.safetensors"

T = TypeVar("T")
AnyFolder = TypeVar("AnyFolder", bound=Folder, covariant=True)


class SetFolder(Generic[AnyFolder]):
    """The folder of one set, whether the set is complete or still being built.

    Every method may raise, in addition to what its own docstring names:
    FileNotFoundError: when the file is not there.
    CorruptError: when it is damaged, or larger than such a file may be.
    StorageError: when the storage refuses.

    Args:
        folder: the folder that its files lie in.
    """

    def __init__(self, folder: AnyFolder) -> None:
        self.folder = folder

    def where(self, name: str = "") -> str:
        """Return where the folder or a file in it lies, for messages."""
        return self.folder.where(name)

    def identity(self) -> SetIdentity:
        """Return what `set.json` says.

        Raises:
            IncompatibleError: when a newer version wrote it.
        """
        return SetIdentity.from_bytes(self.identity_bytes(), self.where(SET_IDENTITY_NAME))

    def identity_bytes(self) -> bytes:
        """Return the content of `set.json`, unparsed."""
        return self.folder.read(SET_IDENTITY_NAME, MAX_SET_IDENTITY_BYTES)

    def manifest(self) -> Manifest:
        """Return what `manifest.json` says.

        Raises:
            IncompatibleError: when a newer version wrote it.
        """
        return Manifest.from_bytes(self.manifest_bytes(), self.where(MANIFEST_NAME))

    def manifest_bytes(self) -> bytes:
        """Return the content of `manifest.json`, unparsed."""
        return self.folder.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)

    def index(self, name: ShardName) -> ShardIndex:
        """Return the index that lies next to a shard's tar."""
        return ShardIndex.from_bytes(self.index_bytes(name), name)

    def index_bytes(self, name: ShardName) -> bytes:
        """Return the content of a shard's index, unparsed."""
        return self.folder.read(name.idx, MAX_INDEX_BYTES)

    def tar(self, name: ShardName) -> RandomAccess:
        """Return a shard's tar, to be read by position."""
        return self.folder.open(name.tar)

    def index_of_tar(
        self, name: ShardName, header: RecordHeader, look: Look | None = None
    ) -> ShardIndex:
        """Return the index that a shard's tar has by its bytes; arguments as `index_of_tar`."""
        return index_of_tar(self.tar(name), name, header, look)

    def header_of_tar(self, name: ShardName) -> RecordHeader | None:
        """Return the header of the first record in a shard's tar; None when it has no record."""
        return header_of_tar(self.tar(name), name)

    def empty_record(self) -> bytes:
        """Return the record of the empty caption, which a text set holds next to its shards."""
        return self.folder.read(EMPTY_RECORD_NAME, MAX_RECORD_BYTES)


def shard_names(names: Iterable[str], set_id: str) -> set[ShardName]:
    """Return the shards that have a tar or an index among the file names of a folder."""
    return {name for each in names if (name := ShardName.parse(each, set_id)) is not None}


def unless_absent(read: Callable[[], T]) -> T | None:
    """Return `read()`; None when the file is not there."""
    try:
        return read()
    except FileNotFoundError:
        return None
