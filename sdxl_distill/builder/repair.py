"""Repairing a set: every good shard goes into a folder beside it, then that one takes its place.

By link, or as a copy where a link is refused: by the file system, or because another user built
the shard. Only when all of them are there is the set renamed aside: what fails before costs
nothing. A set in which nothing is damaged stays where it is.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
from sdxl_distill.limits import (
    MAX_INDEX_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_RECORD_BYTES,
    MAX_SET_IDENTITY_BYTES,
)
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import MANIFEST_NAME, Manifest
from sdxl_distill.shards.set_identity import SET_IDENTITY_NAME, SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.shard_set import EMPTY_RECORD_NAME
from sdxl_distill.shards.tar_index import index_of_tar
from sdxl_distill.storage.fsio import Directory, new_token
from sdxl_distill.storage.path_text import real_path
from sdxl_distill.storage.regular_file import read_bytes, storage_errors

_NUM_THREADS: Final = 8
_NUM_NAMED: Final = 5

Accepts = Callable[[ShardIndex], bool]
"""Whether a tar holds the keys of its shard."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RepairSummary:
    """What a repair found.

    Attributes:
        num_kept: shards that are good and committed.
        num_missing: shards that the next build makes.
        damage: what was in the way, each with the reason; empty when the set stayed as it was.
        folders: where the set as it was is kept; for the user to look at and remove.
    """

    num_kept: int
    num_missing: int
    damage: tuple[str, ...]
    folders: tuple[Path, ...]


def repair_set(
    path: Path,
    identity: SetIdentity,
    shards: Sequence[PlannedShard],
    accepts: Accepts,
    *,
    exclusive: bool = False,
) -> RepairSummary:
    """Keep the good shards of a set and let the next build make the others; rank 0 only.

    An interrupted repair is continued.

    Args:
        path: folder of the set; need not exist.
        identity: what the set is to be; a damaged `set.json` is replaced by it.
        shards: all shards of the set.
        accepts: whether a tar holds the keys of its shard.
        exclusive: `cache.exclusive`.

    Raises:
        ConfigError: when folders lie in it that are not the set's; nothing was touched.
        IncompatibleError: when the set there is another one; nothing was touched.
        StorageError: when the good shards cannot be brought back, for which the set stays where
            it is, or the folder cannot be renamed.
    """
    path = real_path(path)
    for left in path.parent.glob(f"{glob.escape(_beside(path))}*"):  # by a repair that was killed
        shutil.rmtree(left, ignore_errors=True)
    with suppress(FileNotFoundError, CorruptError):
        where = str(path / SET_IDENTITY_NAME)
        content = read_bytes(path / SET_IDENTITY_NAME, MAX_SET_IDENTITY_BYTES)
        identity.require_same(SetIdentity.from_bytes(content, where), where)
    examinations = [
        examine(folder, identity, shards, accepts) for folder in folders_to_repair_from(path)
    ]
    if path.exists():
        examinations.insert(0, examine(path, identity, shards, accepts))
    folders = [each.folder for each in examinations if each.folder != path]
    bring_back = partial(_bring_back, identity, shards, accepts, examinations, exclusive)
    kept: set[PlannedShard] = set()
    if examinations and examinations[0].folder == path and examinations[0].damage:
        require_own_folders(path)
        with _folder_beside(path) as beside:
            kept = bring_back(beside)
            folders.insert(0, withdraw_set(path, for_repair=True))
            with storage_errors(path):
                beside.rename(path)
    elif examinations:
        kept = bring_back(path)
    summary = RepairSummary(
        num_kept=len(kept),
        num_missing=len(shards) - len(kept),
        damage=tuple(fault for each in examinations for fault in each.damage),
        folders=tuple(folders),
    )
    _report(path, summary)
    return summary


def num_existing_draws(path: Path, set_id: str) -> int:
    """Return how many draws the files of a set are of: all are to be kept, wanted now or not."""
    path = real_path(path)
    folders = [folder for folder in (path, *folders_to_repair_from(path)) if folder.is_dir()]
    files = (place.name for folder in folders for place in folder.iterdir())
    names = (ShardName.parse(file, set_id) for file in files)
    return max((name.draw + 1 for name in names if name), default=1)


def restore_catalog(path: Path, *, exclusive: bool = False) -> None:
    """Bring the catalog of a latents set back, when a repair was interrupted before it did so.

    The catalog says which image is in which shard: a scan must go on with that one.
    """
    path = real_path(path)
    for folder in folders_to_repair_from(path):
        with Directory(path, create=True, exclusive=exclusive) as directory:
            _bring_back_catalog(folder, directory)


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """Give a new folder beside a set; it goes in the end, unless it was renamed."""
    beside = path.with_name(f"{_beside(path)}{new_token()}")
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _beside(path: Path) -> str:
    return f".{path.name}.restored-"


def _bring_back(
    identity: SetIdentity,
    shards: Sequence[PlannedShard],
    accepts: Accepts,
    examinations: Sequence[Examination],
    exclusive: bool,
    path: Path,
) -> set[PlannedShard]:
    """Commit in `path` every shard that is good in one of the folders, and return these shards."""
    kept: set[PlannedShard] = set()
    with (
        Directory(path, create=True, exclusive=exclusive) as directory,
        WorkQueue(directory),
    ):
        publish_set_identity(directory, identity)
        for examination in examinations:
            _bring_back_catalog(examination.folder, directory)
            good = [each for each in shards if each.name in examination.good and each not in kept]
            with (
                Directory(examination.folder) as source,
                ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="repair") as pool,
            ):
                list(pool.map(partial(_commit, source, directory, identity, accepts), good))
            kept.update(good)
    return kept


def _commit(
    source: Directory,
    directory: Directory,
    identity: SetIdentity,
    accepts: Accepts,
    shard: PlannedShard,
) -> None:
    name = shard.name
    if not directory.link_from(source, name.tar):
        # A copy, or a tar built again since the repair began: the index of what is there counts.
        directory.copy_from(source, name.tar)
        adopt_shard(directory, name, shard_header(identity, shard), accepts)
        return
    if directory.exists(name.idx):  # as for nearly all shards of a set that stays where it is
        return
    try:
        content = source.read(name.idx, MAX_INDEX_BYTES)
    except FileNotFoundError:
        content = read_index(source, identity, shard).to_bytes()
    directory.publish_bytes(name.idx, content)


def _bring_back_catalog(folder: Path, directory: Directory) -> None:
    """Bring back the segments of a catalog, up to the first of which there is another one."""
    if not (folder / CATALOG_FOLDER).is_dir():
        return
    with Directory(folder / CATALOG_FOLDER) as source, directory.folder(CATALOG_FOLDER) as target:
        for name in sorted(name for name in source.names() if segment_number(name) is not None):
            if not (target.link_from(source, name) or target.copy_from(source, name)):
                return


def _report(path: Path, summary: RepairSummary) -> None:
    if not summary.folders:
        _log.info("%s: none of the %d shards there is damaged", path, summary.num_kept)
        return
    for fault in summary.damage[:_NUM_NAMED]:
        _log.warning("%s: damaged: %s", path, fault)
    if len(summary.damage) > _NUM_NAMED:
        _log.warning("%s: … and %d more", path, len(summary.damage) - _NUM_NAMED)
    _log.info(
        "%s: %d shards are good, %d are made anew; the set as it was stays in %s",
        path,
        summary.num_kept,
        summary.num_missing,
        ", ".join(kept_after_repair(folder).name for folder in summary.folders),
    )


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
    folder: Path, identity: SetIdentity, shards: Sequence[PlannedShard], accepts: Accepts
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
            return _index_digest(directory, identity, shard, accepts)
        except CorruptError as error:
            return error

    with Directory(folder) as directory, ThreadPoolExecutor(_NUM_THREADS) as pool:
        for shard, found in zip(shards, pool.map(look, shards), strict=True):
            if isinstance(found, CorruptError):
                damage.append(f"{shard.name}: {found.found}")
            else:
                digests[shard.name] = found
        damage += _damage_beside_shards(directory, identity, digests)
    good = frozenset(name for name, digest in digests.items() if digest)
    return Examination(folder, good, tuple(damage))


def read_index(directory: Directory, identity: SetIdentity, shard: PlannedShard) -> ShardIndex:
    """Return the index of the tar that is there, from the tar's bytes.

    Raises:
        FileNotFoundError: when there is no tar.
        CorruptError: when it is damaged, of another set, or made from another source.
    """
    descriptor = directory.open(shard.name.tar)
    try:
        return index_of_tar(descriptor, shard.name, shard_header(identity, shard))
    finally:
        os.close(descriptor)


def _index_digest(
    directory: Directory, identity: SetIdentity, shard: PlannedShard, accepts: Accepts
) -> str | None:
    """Return the digest of a good shard's index; None when nothing of the shard is there."""
    name = shard.name
    has_index = directory.exists(name.idx)  # before the tar, which is always there first
    try:
        index = read_index(directory, identity, shard)
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
    directory: Directory, identity: SetIdentity, digests: Mapping[ShardName, str | None]
) -> Iterator[str]:
    """Name what is wrong with set record, manifest and empty record.

    Args:
        directory: of the set.
        identity: that it should have.
        digests: of the indices of good shards; None for a shard that is absent.
    """
    try:
        with suppress(FileNotFoundError):
            where = str(directory.path / SET_IDENTITY_NAME)
            SetIdentity.from_bytes(directory.read(SET_IDENTITY_NAME, MAX_SET_IDENTITY_BYTES), where)
    except CorruptError as error:
        yield f"{SET_IDENTITY_NAME}: {error.found}"
    manifest = None
    try:
        with suppress(FileNotFoundError):
            where = str(directory.path / MANIFEST_NAME)
            content = directory.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
            manifest = Manifest.from_bytes(content, where)
    except CorruptError as error:
        yield f"{MANIFEST_NAME}: {error.found}"
    for entry in manifest.shards if manifest else ():
        name = entry.name(identity.id)
        if digests.get(name, entry.index_digest) != entry.index_digest:
            yield f"{name}: is missing, or another one than the manifest names"
    if identity.kind == "text" and not _is_empty_record_good(directory, manifest):
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
