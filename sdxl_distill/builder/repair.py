"""Repairing a set: every good shard goes into a folder next to it, which then takes its place.

Shards are linked; they are copied where the file system refuses a link or another user built the
shard. The set is renamed aside only when all of them are in the new folder, so a failure before
that costs nothing. A set without damage stays where it is.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

from sdxl_distill.builder.commit import adopt_shard, publish_set_identity, shard_header
from sdxl_distill.builder.plan import PlannedShard
from sdxl_distill.builder.withdrawal import (
    folders_to_repair_from,
    kept_after_repair,
    require_own_folders,
    withdraw_set,
)
from sdxl_distill.builder.work_queue import WorkQueue
from sdxl_distill.catalog.catalog import CATALOG_FOLDER
from sdxl_distill.catalog.segment import segment_number
from sdxl_distill.errors import CorruptError
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import MANIFEST_NAME, Manifest
from sdxl_distill.shards.set_folder import (
    EMPTY_RECORD_NAME,
    SetFolder,
    shard_names,
    unless_absent,
)
from sdxl_distill.shards.set_identity import SET_IDENTITY_NAME, SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.storage.fsio import Directory, new_token
from sdxl_distill.storage.location import Location

_NUM_THREADS: Final = 8
_NUM_NAMED: Final = 5

Accepts = Callable[[ShardIndex], bool]
"""Whether a tar holds the keys of its shard."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RepairSummary:
    """What a repair found.

    Attributes:
        num_kept: the number of shards that are good and committed.
        num_missing: the number of shards that the next build makes.
        damage: what was damaged or missing, with reasons; empty when the set stayed as it was.
        folders: the folders that keep the set as it was; for the user to look at and remove.
    """

    num_kept: int
    num_missing: int
    damage: tuple[str, ...]
    folders: tuple[Location, ...]


def repair_set(
    location: Location,
    identity: SetIdentity,
    shards: Sequence[PlannedShard],
    accepts: Accepts,
    *,
    exclusive: bool = False,
) -> RepairSummary:
    """Keep the good shards of a set and let the next build make the others; rank 0 only.

    An interrupted repair is continued.

    Args:
        location: the folder of the set; need not exist.
        identity: the identity that the set should have; it replaces a damaged `set.json`.
        shards: all shards of the set.
        accepts: the function that says whether a tar holds the keys of its shard.
        exclusive: the value of `cache.exclusive`.

    Raises:
        ConfigError: when it contains folders that are not the set's; nothing was touched.
        IncompatibleError: when the folder holds another set; nothing was touched.
        StorageError: when the good shards cannot be brought back (then the set stays where it
            is), or the folder cannot be renamed.
    """
    location = location.real()
    for left in location.siblings(_prefix(location)):  # by a repair that was killed
        left.remove()
    with suppress(FileNotFoundError, CorruptError):
        folder = SetFolder(location.look())
        identity.require_same(folder.identity(), folder.where(SET_IDENTITY_NAME))
    # Examine what an unfinished repair set aside, and the present set, which comes first.
    examinations = [
        examine(each, identity, shards, accepts) for each in folders_to_repair_from(location)
    ]
    if location.exists():
        examinations.insert(0, examine(location, identity, shards, accepts))
    folders = [each.location for each in examinations if each.location != location]
    bring_back = partial(_bring_back, identity, shards, accepts, examinations, exclusive)
    kept: set[PlannedShard] = set()
    if examinations and examinations[0].location == location and examinations[0].damage:
        # Everything good goes into a folder of its own before the set is renamed aside.
        require_own_folders(location)
        with _folder_next_to(location) as restored:
            kept = bring_back(restored)
            folders.insert(0, withdraw_set(location, for_repair=True))
            restored.rename(location)
    elif examinations:
        kept = bring_back(location)
    summary = RepairSummary(
        num_kept=len(kept),
        num_missing=len(shards) - len(kept),
        damage=tuple(fault for each in examinations for fault in each.damage),
        folders=tuple(folders),
    )
    _report(location, summary)
    return summary


def num_existing_draws(location: Location, set_id: str) -> int:
    """Return the number of draws that a set has files of: all are kept, wanted now or not."""
    names: set[ShardName] = set()
    for folder in (location.real(), *folders_to_repair_from(location)):
        if folder.is_folder():
            with folder.open() as directory:
                names |= shard_names(directory.names(), set_id)
    return max((name.draw + 1 for name in names), default=1)


def restore_catalog(location: Location, *, exclusive: bool = False) -> None:
    """Bring the catalog of a latents set back if a repair was interrupted before doing so.

    The catalog says which image is in which shard: a scan must continue that one.
    """
    location = location.real()
    for folder in folders_to_repair_from(location):
        with location.open(create=True, exclusive=exclusive) as directory:
            _bring_back_catalog(folder, directory)


@contextmanager
def _folder_next_to(location: Location) -> Iterator[Location]:
    """Yield a new folder next to a set; it is removed at the end, unless it was renamed."""
    restored = location.renamed(f"{_prefix(location)}{new_token()}")
    try:
        yield restored
    finally:
        restored.remove()


def _prefix(location: Location) -> str:
    return f".{location.name}.restored-"


def _bring_back(
    identity: SetIdentity,
    shards: Sequence[PlannedShard],
    accepts: Accepts,
    examinations: Sequence[Examination],
    exclusive: bool,
    location: Location,
) -> set[PlannedShard]:
    """Commit in `location` every shard that is good in one of the folders, and return these."""
    kept: set[PlannedShard] = set()
    with location.open(create=True, exclusive=exclusive) as directory, WorkQueue(directory):
        target = SetFolder(directory)
        publish_set_identity(target, identity)
        for examination in examinations:
            _bring_back_catalog(examination.location, directory)
            good = [each for each in shards if each.name in examination.good and each not in kept]
            with (
                examination.location.open() as opened,
                ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="repair") as pool,
            ):
                commit = partial(_commit, SetFolder(opened), target, identity, accepts)
                list(pool.map(commit, good))
            kept.update(good)
    return kept


def _commit(
    source: SetFolder[Directory],
    target: SetFolder[Directory],
    identity: SetIdentity,
    accepts: Accepts,
    shard: PlannedShard,
) -> None:
    name, directory, header = shard.name, target.folder, shard_header(identity, shard)
    if not directory.link_from(source.folder, name.tar):
        # A copy, or a tar built again since the repair began: its own index counts.
        directory.copy_from(source.folder, name.tar)
        adopt_shard(target, name, header, accepts)
        return
    if directory.exists(name.idx):  # as for nearly all shards of a set that stays where it is
        return
    content = unless_absent(partial(source.index_bytes, name))
    if content is None:
        content = source.index_of_tar(name, header).to_bytes()
    directory.publish_bytes(name.idx, content)


def _bring_back_catalog(location: Location, directory: Directory) -> None:
    """Bring back a catalog's segments, stopping at the first name that another file holds."""
    if not (location / CATALOG_FOLDER).is_folder():
        return
    with (location / CATALOG_FOLDER).open() as source, directory.folder(CATALOG_FOLDER) as target:
        for name in sorted(name for name in source.names() if segment_number(name) is not None):
            if not (target.link_from(source, name) or target.copy_from(source, name)):
                return


def _report(location: Location, summary: RepairSummary) -> None:
    if not summary.folders:
        _log.info("%s: none of the %d existing shards is damaged", location, summary.num_kept)
        return
    for fault in summary.damage[:_NUM_NAMED]:
        _log.warning("%s: damaged: %s", location, fault)
    if len(summary.damage) > _NUM_NAMED:
        _log.warning("%s: … and %d more", location, len(summary.damage) - _NUM_NAMED)
    _log.info(
        "%s: %d shards are good, %d will be built again; the set as it was is kept in %s",
        location,
        summary.num_kept,
        summary.num_missing,
        ", ".join(kept_after_repair(folder).name for folder in summary.folders),
    )


@dataclass(frozen=True)
class Examination:
    """What is in one folder.

    Attributes:
        location: the folder.
        good: the names of the good shards.
        damage: the faults in the way of a build, each with the reason. A shard without any file
            is not a fault, unless the manifest says that the set was complete.
    """

    location: Location
    good: frozenset[ShardName]
    damage: tuple[str, ...]


def examine(
    location: Location, identity: SetIdentity, shards: Sequence[PlannedShard], accepts: Accepts
) -> Examination:
    """Read every shard of a set, strictly and from start to end, and what describes them.

    A shard is good if its tar belongs to this set and source, and its index, if there is one, is
    that of the tar's bytes.

    Raises:
        IncompatibleError: when a newer version wrote the set.
        StorageError: when the operating system refuses.
    """
    digests: dict[ShardName, str | None] = {}
    damage: list[str] = []

    def look(shard: PlannedShard) -> str | CorruptError | None:
        try:
            return _index_digest(folder, identity, shard, accepts)
        except CorruptError as error:
            return error

    with location.open() as directory, ThreadPoolExecutor(_NUM_THREADS) as pool:
        folder = SetFolder(directory)
        for shard, found in zip(shards, pool.map(look, shards), strict=True):
            if isinstance(found, CorruptError):
                damage.append(f"{shard.name}: {found.found}")
            else:
                digests[shard.name] = found
        damage += _damage_next_to_shards(folder, identity, digests)
    good = frozenset(name for name, digest in digests.items() if digest)
    return Examination(location, good, tuple(damage))


def _index_digest(
    folder: SetFolder[Directory], identity: SetIdentity, shard: PlannedShard, accepts: Accepts
) -> str | None:
    """Return the digest of a good shard's index; None when the shard has no file."""
    name = shard.name
    has_index = folder.folder.exists(name.idx)  # asked before the tar, which always comes first
    index = unless_absent(partial(folder.index_of_tar, name, shard_header(identity, shard)))
    if index is None:
        if has_index:
            raise CorruptError("its tar is missing")
        return None
    stored = unless_absent(partial(folder.index_bytes, name))
    if stored is not None and stored != index.to_bytes():
        raise CorruptError("tar and index do not agree")
    if not accepts(index):
        raise CorruptError("its keys are not those of this shard")
    return index.digest


def _damage_next_to_shards(
    folder: SetFolder[Directory],
    identity: SetIdentity,
    digests: Mapping[ShardName, str | None],
) -> Iterator[str]:
    """Name what is wrong with set identity, manifest and empty record.

    Args:
        folder: the set's folder.
        identity: the identity that the set should have.
        digests: the digests of the indices of good shards; None for a shard that is absent.
    """
    manifest = None
    try:
        unless_absent(folder.identity)
    except CorruptError as error:
        yield f"{SET_IDENTITY_NAME}: {error.found}"
    try:
        manifest = unless_absent(folder.manifest)
    except CorruptError as error:
        yield f"{MANIFEST_NAME}: {error.found}"
    for entry in manifest.shards if manifest else ():
        name = entry.name(identity.id)
        if digests.get(name, entry.index_digest) != entry.index_digest:
            yield f"{name}: is missing, or is not the one that the manifest names"
    if identity.kind == "text" and not _is_empty_record_good(folder, manifest):
        yield f"{EMPTY_RECORD_NAME}: is not the one that the manifest names"


def _is_empty_record_good(folder: SetFolder[Directory], manifest: Manifest | None) -> bool:
    """Whether the manifest vouches for the empty caption's record, or neither exists."""
    try:
        content = unless_absent(folder.empty_record)
    except CorruptError:
        return False
    if content is None:
        return manifest is None
    digest = hashlib.sha256(content).hexdigest()
    return manifest is not None and digest == manifest.empty_sha256
