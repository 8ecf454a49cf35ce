"""Finishing a set: when all shards are committed, one worker writes the manifest.

The manifest is a function of set record, catalog and indices, so two finishers write the same
bytes; the claim on it only saves reading every index twice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from sdxl_distill.build.commit import REPAIR, naming_repair, shard_header
from sdxl_distill.build.in_place import require_in_place, until_not_swept
from sdxl_distill.build.plan import PlannedShard
from sdxl_distill.build.withdrawal import discard_withdrawn
from sdxl_distill.build.work_queue import WorkQueue
from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.fsio import Directory
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.index_layout import MAX_INDEX_BYTES
from sdxl_distill.shards.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from sdxl_distill.shards.set_record import SetRecord
from sdxl_distill.stop_request import StopRequest

FINISH = "finish"

Describe = Callable[[Directory, SetRecord, Iterable[ShardIndex]], Manifest]
"""Makes the manifest from the folder, the set record there and all indices in order."""


def finish_set(
    directory: Directory,
    queue: WorkQueue,
    record: SetRecord,
    shards: Sequence[PlannedShard],
    catalog: int,
    describe: Describe,
    stop: StopRequest,
) -> Manifest:
    """Return the manifest of a set whose shards are all committed; write it if need be.

    While another worker writes it, wait for that one, or for its death.

    Args:
        directory: of the set.
        queue: the claims on it.
        record: the set record that is there.
        shards: all shards of catalog `catalog`.
        catalog: its number; a manifest of a greater one is left alone.
        describe: makes the manifest.
        stop: ends the wait.

    Raises:
        CorruptError: when an index or tar is missing, damaged, or of another set.
        IncompatibleError: when a shard was made from another latents shard than today's.
        StorageError, Preempted: as `build_shards`.
    """
    while (found := _manifest_there(directory, record, shards, catalog)) is None:
        stop.check(str(directory.path))
        require_in_place(directory)
        claim = queue.claim(FINISH)
        if claim is None:
            time.sleep(queue.timing.poll_seconds)
            continue
        manifest = describe(directory, record, _indices(directory, queue, record, shards))
        replace = partial(directory.replace_bytes, MANIFEST_NAME, manifest.to_bytes())
        until_not_swept(directory, replace)
        queue.release(claim, committed=False)
    discard_withdrawn(directory.path, record.id)
    queue.sweep()
    return found


def _manifest_there(
    directory: Directory, record: SetRecord, shards: Sequence[PlannedShard], catalog: int
) -> Manifest | None:
    """Return the manifest that is there, if it describes at least these shards."""
    try:
        content = directory.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        manifest = Manifest.from_bytes(content, str(directory.path / MANIFEST_NAME))
    except (FileNotFoundError, CorruptError):
        return None
    if manifest.record != record or manifest.catalog < catalog:
        return None
    sources = dict(
        zip(manifest.names(), (entry.source_sha256 for entry in manifest.shards), strict=True)
    )
    planned = {shard.name: shard.source_sha256 for shard in shards}
    if manifest.catalog == catalog and not planned.items() <= sources.items():
        return None
    return manifest


def _indices(
    directory: Directory, queue: WorkQueue, record: SetRecord, shards: Sequence[PlannedShard]
) -> Iterator[ShardIndex]:
    for shard in shards:
        with naming_repair(str(directory.path / shard.name.idx)):
            index = _index(directory, record, shard)
        yield index
        queue.heartbeat.show_progress()


def _index(directory: Directory, record: SetRecord, shard: PlannedShard) -> ShardIndex:
    name, expected = shard.name, shard_header(record, shard)
    try:
        index = ShardIndex.from_bytes(directory.read(name.idx, MAX_INDEX_BYTES), name)
        descriptor = directory.open(name.tar)
    except FileNotFoundError as error:
        raise CorruptError("the index or its tar, once committed, is missing") from error
    num_bytes = os.fstat(descriptor).st_size
    os.close(descriptor)
    if index.header.source_sha256 != expected.source_sha256:
        raise IncompatibleError(
            "the shard was made from another latents shard than the one there today",
            where=str(directory.path / name.idx),
            action=REPAIR,
        )
    if index.header.content != expected.content or num_bytes != index.tar_bytes:
        raise CorruptError(
            f"an index of another set, or of a tar of {index.tar_bytes} bytes",
            expected=f"an index of set {record.id} and its tar of {num_bytes} bytes",
        )
    return index
