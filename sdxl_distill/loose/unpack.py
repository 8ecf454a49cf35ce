"""Unpacks a shard set into a loose folder: the files that `tar -xf` on every shard would give.

Every byte is checked against the index on its way, and every file appears whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sdxl_distill.errors import StorageError
from sdxl_distill.loose.folder import LooseRecord, open_new_folder
from sdxl_distill.loose.segments import copy_catalog, has_catalog
from sdxl_distill.runtime.ordered_map import ordered_map
from sdxl_distill.shards.set_folder import EMPTY_RECORD_NAME
from sdxl_distill.shards.set_identity import SET_IDENTITY_NAME
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.shard_set import ShardSet, open_shard_set
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.location import Location


class Unpacked(NamedTuple):
    """What was written."""

    num_records: int
    num_bytes: int


def unpack_set(
    path: str | Path | Location,
    output: str | Path | Location,
    *,
    num_threads: int = 1,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Unpacked:
    """Write every record of a complete set as a file of its own, and `set.json` last.

    For latents, the catalog and the manifest go into `catalog/`.

    Args:
        path: the folder of the set; it is only read.
        output: a new or empty folder.
        num_threads: the number of shards that are unpacked at once.
        on_progress: called with the number of shards that are done and the number of all.

    Raises:
        ConfigError: when there is no complete set, or the output folder is not empty.
        CorruptError: when a record is damaged; files written before stay.
        StorageError: when the disk is full or refuses.
    """
    target = Location(output)
    with open_shard_set(path) as shard_set, open_new_folder(target) as directory:
        names = shard_set.manifest.names()
        num_records = num_bytes = 0
        unpack = partial(_unpack_shard, shard_set, directory)
        for num_done, done in enumerate(ordered_map(unpack, names, num_threads, "unpack"), 1):
            num_records += done.num_records
            num_bytes += done.num_bytes
            on_progress(num_done, len(names))
        if shard_set.manifest.empty_sha256 is not None:
            shard_set.read_empty_record()  # checks it
            _write_new(directory, EMPTY_RECORD_NAME, shard_set.folder.empty_record())
        if shard_set.manifest.identity.kind == "latents" and has_catalog(shard_set.location):
            copy_catalog(shard_set.location, target, shard_set.manifest)
        _write_new(directory, SET_IDENTITY_NAME, shard_set.folder.identity_bytes())
    return Unpacked(num_records, num_bytes)


def _unpack_shard(shard_set: ShardSet, directory: Directory, name: ShardName) -> Unpacked:
    reader = shard_set.reader(name)
    index = reader.index
    num_bytes = 0
    for number in range(index.num_records):
        record = LooseRecord(name.width, name.height, name.draw, index.image_id(number))
        content = index.header.encode(reader.read_record(number))
        _write_new(directory, record.file_name, content)
        sidecar = reader.read_sidecar(number)
        if sidecar:
            _write_new(directory, record.sidecar_name, sidecar)
        num_bytes += len(content) + len(sidecar)
    return Unpacked(index.num_records, num_bytes)


def _write_new(directory: Directory, name: str, content: bytes) -> None:
    if not directory.publish_bytes(name, content):
        raise StorageError(
            "another process is writing to the folder",
            where=directory.where(name),
            action="unpack into a folder that nothing else writes to",
        )
