"""What is good in the folder of a set and what is damaged: what a repair may keep."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sdxl_distill.builder.commit import shard_header
from sdxl_distill.builder.plan import PlannedShard
from sdxl_distill.errors import CorruptError
from sdxl_distill.fsio import Directory
from sdxl_distill.limits import (
    MAX_INDEX_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_RECORD_BYTES,
    MAX_SET_RECORD_BYTES,
)
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import MANIFEST_NAME, Manifest
from sdxl_distill.shards.set_record import SET_RECORD_NAME, SetRecord
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.shard_set import EMPTY_RECORD_NAME
from sdxl_distill.shards.tar_index import index_of_tar

Accepts = Callable[[ShardIndex], bool]
"""Whether a tar holds the keys of its shard."""

_NUM_THREADS: Final = 8


@dataclass(frozen=True)
class Examination:
    """What is in one folder.

    Attributes:
        folder: that was read.
        good: names of the good shards.
        damage: what is in the way of a build, each with the reason. A shard of which nothing is
            there is not, unless the manifest says that the set was complete.
    """

    folder: Path
    good: frozenset[ShardName]
    damage: tuple[str, ...]


def examine(
    folder: Path, record: SetRecord, shards: Sequence[PlannedShard], accepts: Accepts
) -> Examination:
    """Read every shard of a set, strictly and from start to end, and what describes them.

    Good is a tar that belongs to this set and source, and whose index, if there is one, is that
    of its bytes.

    Raises:
        IncompatibleError: when a newer version wrote the set.
        StorageError: when the operating system refuses.
    """
    digests: dict[ShardName, str | None] = {}
    damage: list[str] = []

    def look(shard: PlannedShard) -> str | CorruptError | None:
        try:
            return _index_digest(directory, record, shard, accepts)
        except CorruptError as error:
            return error

    with Directory(folder) as directory, ThreadPoolExecutor(_NUM_THREADS) as pool:
        for shard, found in zip(shards, pool.map(look, shards), strict=True):
            if isinstance(found, CorruptError):
                damage.append(f"{shard.name}: {found.found}")
            else:
                digests[shard.name] = found
        damage += _damage_beside_shards(directory, record, digests)
    good = frozenset(name for name, digest in digests.items() if digest)
    return Examination(folder, good, tuple(damage))


def read_index(directory: Directory, record: SetRecord, shard: PlannedShard) -> ShardIndex:
    """Return the index of the tar that is there, from the tar's bytes.

    Raises:
        FileNotFoundError: when there is no tar.
        CorruptError: when it is damaged, of another set, or made from another source.
    """
    descriptor = directory.open(shard.name.tar)
    try:
        return index_of_tar(descriptor, shard.name, shard_header(record, shard))
    finally:
        os.close(descriptor)


def _index_digest(
    directory: Directory, record: SetRecord, shard: PlannedShard, accepts: Accepts
) -> str | None:
    """Return the digest of a good shard's index; None when nothing of the shard is there."""
    name = shard.name
    has_index = directory.exists(name.idx)  # before the tar, which is always there first
    try:
        index = read_index(directory, record, shard)
    except FileNotFoundError as error:
        if has_index:
            raise CorruptError("its tar is missing") from error
        return None
    with suppress(FileNotFoundError):
        if directory.read(name.idx, MAX_INDEX_BYTES) != index.to_bytes():
            raise CorruptError("tar and index do not agree")
    if not accepts(index):
        raise CorruptError("has other keys")
    return index.digest


def _damage_beside_shards(
    directory: Directory, record: SetRecord, digests: Mapping[ShardName, str | None]
) -> Iterator[str]:
    """Name what is wrong with set record, manifest and empty record.

    Args:
        directory: of the set.
        record: that it should have.
        digests: of the indices of good shards; None for a shard that is absent.
    """
    try:
        with suppress(FileNotFoundError):
            where = str(directory.path / SET_RECORD_NAME)
            SetRecord.from_bytes(directory.read(SET_RECORD_NAME, MAX_SET_RECORD_BYTES), where)
    except CorruptError as error:
        yield f"{SET_RECORD_NAME}: {error.found}"
    manifest = None
    try:
        with suppress(FileNotFoundError):
            where = str(directory.path / MANIFEST_NAME)
            content = directory.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
            manifest = Manifest.from_bytes(content, where)
    except CorruptError as error:
        yield f"{MANIFEST_NAME}: {error.found}"
    for entry in manifest.shards if manifest else ():
        name = entry.name(record.id)
        if digests.get(name, entry.index_digest) != entry.index_digest:
            yield f"{name}: is missing, or another one than the manifest names"
    if record.kind == "text" and not _is_empty_record_good(directory, manifest):
        yield f"{EMPTY_RECORD_NAME}: is not the one that the manifest names"


def _is_empty_record_good(directory: Directory, manifest: Manifest | None) -> bool:
    """Whether the manifest vouches for the empty caption's record, or neither is there."""
    try:
        content = directory.read(EMPTY_RECORD_NAME, MAX_RECORD_BYTES)
    except FileNotFoundError:
        return manifest is None
    except CorruptError:
        return False
    digest = hashlib.sha256(content).hexdigest()
    return manifest is not None and digest == manifest.empty_sha256
