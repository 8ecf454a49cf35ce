"""Builds a whole set: set record, shards, manifest, in the order that the protocol wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from sdxl_distill.builder.commit import publish_set_record
from sdxl_distill.builder.finish import Describe, finish_set
from sdxl_distill.builder.heartbeat import Timing
from sdxl_distill.builder.launch import require_one_worker
from sdxl_distill.builder.manifest_there import ManifestThere, require_files
from sdxl_distill.builder.plan import PlannedShard
from sdxl_distill.builder.shard_builder import (
    Batch,
    BuildSummary,
    Result,
    ShardContent,
    build_shards,
)
from sdxl_distill.builder.work_queue import WorkQueue
from sdxl_distill.fsio import Directory
from sdxl_distill.path_text import real_path
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.set_record import SetRecord
from sdxl_distill.stop_request import StopRequest
from sdxl_distill.world import World


class BuiltSet(NamedTuple):
    """A complete set, and what this worker did for it."""

    manifest: Manifest
    summary: BuildSummary


def build_set(
    path: Path,
    record: SetRecord,
    shards: Sequence[PlannedShard],
    make_content: Callable[[], ShardContent[Batch, Result]],
    describe: Describe,
    world: World,
    *,
    catalog: int = 0,
    exclusive: bool = False,
    timing: Timing | None = None,
) -> BuiltSet:
    """Build what is missing of a set, beside any other workers, and return when it is complete.

    Call it from the main thread: SIGTERM and SIGUSR1 are listened to.

    Args:
        path: folder of the set; made when it does not exist.
        record: the identity of the set.
        shards: all shards of catalog `catalog`, the same list for every worker.
        make_content: loads what builds them; called after the set record was accepted, and
            only when a shard is missing.
        describe: makes the manifest.
        world: this worker among those of its launch.
        catalog: number n of the catalog.
        exclusive: `cache.exclusive`.
        timing: heartbeats, expiry and take-over.

    Raises:
        ConfigError: when `exclusive` is promised to a launch of several workers.
        IncompatibleError: when another configuration owns the folder; nothing was loaded.
        CorruptError: when something there is damaged, foreign, or missing though the set was
            complete; names `--repair`.
        StorageError: when the disk is full or refuses; committed work is kept.
        Preempted: after a signal; own claims and temporary files are gone.
    """
    require_one_worker(world, exclusive, str(path))
    # Resolved once: where the folder is a symbolic link, a withdrawal renames what it points to.
    with (
        Directory(real_path(path), create=True, exclusive=exclusive) as directory,
        WorkQueue(directory, timing) as queue,
        StopRequest().listening() as stop,
    ):
        record = publish_set_record(directory, record)
        if world.is_main:
            queue.sweep_temporaries()
        there = ManifestThere(directory)
        found = there.read() if world.is_main else None
        if found is not None and found.record == record:
            require_files(directory, found)
        names = directory.names()
        summary = BuildSummary(len(shards), num_present=sum(s.name.idx in names for s in shards))
        if summary.num_present < len(shards):
            content = make_content()
            summary = build_shards(directory, queue, record, shards, content, world, stop)
        manifest = finish_set(directory, there, queue, record, shards, catalog, describe, stop)
    return BuiltSet(manifest, summary)
