"""Repairing a set: it is renamed aside, and every good shard is published back by link."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sdxl_distill.build.commit import publish_set_record, shard_header
from sdxl_distill.build.plan import PlannedShard
from sdxl_distill.build.withdrawal import CATALOG_FOLDER, folders_to_repair_from, withdraw_set
from sdxl_distill.build.work_queue import WorkQueue
from sdxl_distill.errors import CorruptError
from sdxl_distill.fsio import Directory, read_bytes, storage_errors
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.index_layout import MAX_INDEX_BYTES
from sdxl_distill.shards.set_record import MAX_SET_RECORD_BYTES, SET_RECORD_NAME, SetRecord
from sdxl_distill.shards.tar_index import index_of_tar

_NUM_THREADS = 8


@dataclass
class RepairSummary:
    """What a repair found."""

    num_kept: int = 0
    """Shards that were good and are committed again."""
    damaged: list[str] = field(default_factory=list[str])
    """Shards that the next build makes anew, each with the reason."""
    folders: list[Path] = field(default_factory=list[Path])
    """Where the set as it was is kept; for the user to look at and remove."""


def repair_set(
    path: Path,
    record: SetRecord,
    shards: Sequence[PlannedShard],
    accepts: Callable[[ShardIndex], bool],
) -> RepairSummary:
    """Keep the good shards of a set and let the next build make the others; rank 0 only.

    Good is a tar that reads strictly, belongs to this set and source, and whose index, if there
    is one, is that of its bytes. An interrupted repair is continued.

    Args:
        path: folder of the set.
        record: what the set is to be; a damaged `set.json` is replaced by it.
        shards: all shards of the set.
        accepts: whether a tar holds the keys of its shard.

    Raises:
        IncompatibleError: when the set there is another one; nothing was touched.
        StorageError: when the folder cannot be renamed or files cannot be linked.
    """
    path = path.resolve()
    with suppress(FileNotFoundError, CorruptError):
        where = str(path / SET_RECORD_NAME)
        content = read_bytes(path / SET_RECORD_NAME, MAX_SET_RECORD_BYTES)
        record.require_same(SetRecord.from_bytes(content, where), where)
    folders = folders_to_repair_from(path) or [withdraw_set(path, for_repair=True)]
    summary = RepairSummary(folders=folders)
    with Directory(path, create=True) as directory, WorkQueue(directory):
        publish_set_record(directory, record)
        for folder in folders:
            _link_catalog(folder, path)

        def bring_back(shard: PlannedShard) -> str | None:
            faults = [_bring_back(directory, folder, record, shard, accepts) for folder in folders]
            return None if None in faults else faults[0]

        with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="repair") as pool:
            for shard, fault in zip(shards, pool.map(bring_back, shards), strict=True):
                if fault is None:
                    summary.num_kept += 1
                else:
                    summary.damaged.append(f"{shard.name}: {fault}")
    return summary


def _bring_back(
    directory: Directory,
    folder: Path,
    record: SetRecord,
    shard: PlannedShard,
    accepts: Callable[[ShardIndex], bool],
) -> str | None:
    """Publish one shard again; return what is wrong with it, None when nothing."""
    name = shard.name
    with Directory(folder) as source:
        try:
            descriptor = source.open(name.tar)
            try:
                index = index_of_tar(descriptor, name, shard_header(record, shard))
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return "is missing"
        except CorruptError as error:
            return error.found
        content = index.to_bytes()
        try:
            stored = source.read(name.idx, MAX_INDEX_BYTES)
        except FileNotFoundError:
            stored = content
        except CorruptError as error:
            return error.found
        if stored != content or not accepts(index):
            return "tar and index do not agree" if stored != content else "has other keys"
        _link(source, directory, name.tar)
        directory.publish_bytes(name.idx, content)
    return None


def _link_catalog(folder: Path, path: Path) -> None:
    """Bring back the catalog of a latents set: it says which image is in which shard."""
    if not (folder / CATALOG_FOLDER).is_dir():
        return
    with (
        Directory(folder / CATALOG_FOLDER) as source,
        Directory(path / CATALOG_FOLDER, create=True) as target,
    ):
        for name in sorted(source.names()):
            if (source.path / name).is_file():
                _link(source, target, name)


def _link(source: Directory, target: Directory, name: str) -> None:
    """Give a file its name in another folder too, create-only: an interrupted repair did so."""
    with storage_errors(target.path / name), suppress(FileExistsError):
        os.link(name, name, src_dir_fd=source.descriptor, dst_dir_fd=target.descriptor)
    with storage_errors(target.path):
        os.fsync(target.descriptor)
