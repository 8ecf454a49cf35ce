"""How a set and its shards become part of the cache: create-only, tar first, then its index.

A worker that finds a tar under the name reads it strictly and publishes *its* index, not its own.
So a name has one content for good, and tar and index cannot mix, whichever worker sleeps, dies,
works twice or rounds differently (docs/decisions/0002-create-only-publication.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sdxl_distill.builder.in_place import until_not_swept
from sdxl_distill.builder.plan import PlannedShard
from sdxl_distill.errors import CorruptError
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.set_folder import SetFolder, unless_absent
from sdxl_distill.shards.set_identity import SET_IDENTITY_NAME, SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.regular_file import LostDirectoryError, storage_errors
from sdxl_distill.storage.staged_file import StagedFile

REPAIR = "run the builder once with --repair: it keeps the good shards and rebuilds this one"


def publish_set_identity(folder: SetFolder[Directory], identity: SetIdentity) -> SetIdentity:
    """Write `set.json`, or check that the existing one describes the same set; return it.

    Call it before the first claim and before any model is loaded: a folder that belongs to
    another configuration is refused here. The identity returned may name other locations of
    the sets that it was made from.

    Raises:
        IncompatibleError: naming every field that differs.
        CorruptError: when the existing one is damaged.
        StorageError: when the folder cannot be written.
    """
    where = folder.where(SET_IDENTITY_NAME)
    found = until_not_swept(folder.folder, lambda: _existing_identity(folder, identity, where))
    identity.require_same(found, where)
    return found


def _existing_identity(
    folder: SetFolder[Directory], identity: SetIdentity, where: str
) -> SetIdentity:
    if folder.folder.publish_bytes(SET_IDENTITY_NAME, identity.to_bytes()):
        return identity
    try:
        with naming_repair(where):
            return folder.identity()
    except FileNotFoundError as error:
        raise LostDirectoryError("a file that existed a moment ago is gone") from error


def shard_header(identity: SetIdentity, shard: PlannedShard) -> RecordHeader:
    """Return the header that every record of a shard must have, byte for byte."""
    name = shard.name
    return RecordHeader.build(
        identity.schema, name.width, name.height, identity.fingerprint, shard.source_sha256
    )


def adopt_shard(
    folder: SetFolder[Directory],
    name: ShardName,
    header: RecordHeader,
    accepts: Callable[[ShardIndex], bool],
) -> ShardIndex | None:
    """Commit the existing tar, whichever worker wrote it; None when there is none.

    Args:
        folder: the set's folder, opened before it was looked at.
        name: the shard's name.
        header: the header that its records must have: set fingerprint, schema, source.
        accepts: the function that says whether the tar holds the keys of this shard.

    Raises:
        CorruptError: when it is damaged or belongs to another set; names `--repair`.
        StorageError: when the operating system refuses.
    """
    directory, where = folder.folder, folder.where(name.tar)
    with naming_repair(where):
        index = unless_absent(lambda: folder.index_of_tar(name, header))
    if index is None:
        return None
    if not accepts(index):
        raise CorruptError(
            f"the keys of its {index.num_records} records are not those of this shard",
            where=where,
            action=REPAIR,
        )
    until_not_swept(directory, lambda: directory.publish_bytes(name.idx, index.to_bytes()))
    return index


def commit_shard(
    folder: SetFolder[Directory],
    tar: StagedFile,
    index: ShardIndex,
    accepts: Callable[[ShardIndex], bool],
) -> ShardIndex:
    """Publish a staged tar and its index; if a tar exists already, publish the index of that.

    Args:
        folder: the set's folder, opened before it was looked at.
        tar: the tar, staged in that folder.
        index: the index of the staged tar.
        accepts: the function that says whether an existing tar holds the keys of this shard.

    Returns:
        The index that counts: that of the tar under the shard's name.

    Raises:
        LostDirectoryError: when another process removed what was staged, or the folder.
        CorruptError: when an existing tar is damaged or belongs to another set.
        StorageError: when the disk is full or refuses; nothing committed is touched.
    """
    directory, name = folder.folder, index.name
    # Staged before the tar is published, so that a full disk cannot part the two.
    with directory.stage() as idx:
        with storage_errors(folder.where(name.idx)):
            idx.file.write(index.to_bytes())
            idx.seal()
        if directory.publish(tar, name.tar):
            directory.publish(idx, name.idx)
            return index
    adopted = adopt_shard(folder, name, index.header, accepts)
    if adopted is None:
        raise LostDirectoryError(
            "a tar that existed a moment ago is gone",
            where=folder.where(name.tar),
            action="run again; committed work is kept",
        )
    return adopted


@contextmanager
def naming_repair(where: str) -> Iterator[None]:
    """Make a CorruptError of the block name the damaged file of the set, and `--repair`."""
    try:
        yield
    except CorruptError as error:
        raise CorruptError(
            error.found, expected=error.expected, where=where, action=REPAIR
        ) from error
