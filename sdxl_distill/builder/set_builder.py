"""Builds the shards of any set: claim, read, compute, encode, commit, with everything overlapping.

What a set holds is a `ShardContent`; this loop is shared by latents, text and predictions.
While one shard is computed the next is claimed and read, and the one before is written, synced
and committed. There is no barrier: a worker ends when every shard of the set is committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from sdxl_distill.builder.commit import (
    adopt_shard,
    commit_shard,
    publish_set_identity,
    shard_header,
)
from sdxl_distill.builder.existing_manifest import ExistingManifest, require_files
from sdxl_distill.builder.finish import Describe, finish_set
from sdxl_distill.builder.heartbeat import Timing
from sdxl_distill.builder.launch import require_one_worker
from sdxl_distill.builder.pipeline import run_pipeline
from sdxl_distill.builder.plan import PlannedShard, SetBuild
from sdxl_distill.builder.progress import shown_progress
from sdxl_distill.builder.work_queue import Claim, WorkQueue
from sdxl_distill.runtime.stop_request import StopRequest
from sdxl_distill.runtime.world import World
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.set_folder import SetFolder
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.shards.writer import ShardWriter
from sdxl_distill.storage.location import Location
from sdxl_distill.storage.regular_file import LostDirectoryError


class BuiltSet(NamedTuple):
    """A complete set, and what this worker did for it."""

    manifest: Manifest
    summary: BuildSummary


def build_set(
    location: Location,
    identity: SetIdentity,
    shards: Sequence[PlannedShard],
    make_content: Callable[[], ShardContent[Batch, Result]],
    describe: Describe,
    world: World,
    *,
    catalog: int = 0,
    exclusive: bool = False,
    timing: Timing | None = None,
) -> BuiltSet:
    """Build what is missing of a set, next to any other workers, and return when it is complete.

    Call it from the main thread: it listens for SIGTERM and SIGUSR1.

    Args:
        location: the folder of the set; made when it does not exist.
        identity: the identity of the set.
        shards: all shards of catalog `catalog`, the same list for every worker.
        make_content: the function that loads what builds them; called after the set identity was
            accepted, and only if a shard is missing.
        describe: the function that makes the manifest.
        world: this worker among those of its launch.
        catalog: the catalog's number n.
        exclusive: the value of `cache.exclusive`.
        timing: the times of heartbeats, expiry and take-over.

    Raises:
        ConfigError: when `exclusive` is promised to a launch of several workers.
        IncompatibleError: when another configuration owns the folder; nothing was loaded.
        CorruptError: when a file is damaged, foreign or lost; names `--repair`.
        StorageError: when the disk is full or refuses; committed work is kept.
        Preempted: after a signal; this worker's claims and temporary files are removed.
    """
    require_one_worker(world, exclusive, str(location))
    # Resolved once: where the folder is a symbolic link, a withdrawal renames what it points to.
    with (
        location.real().open(create=True, exclusive=exclusive) as directory,
        WorkQueue(directory, timing) as queue,
        StopRequest().listening() as stop,
    ):
        folder = SetFolder(directory)
        identity = publish_set_identity(folder, identity)
        build = SetBuild(folder, queue, identity, shards, stop)
        # Rank 0 sweeps what dead workers left, and refuses a complete set that lost files.
        if world.is_main:
            queue.sweep_temporaries()
        existing = ExistingManifest(folder)
        found = existing.read() if world.is_main else None
        if found is not None and found.identity == identity:
            require_files(directory, found)
        # The model is loaded only if a shard is missing.
        names = directory.names()
        summary = BuildSummary(len(shards), num_present=sum(s.name.idx in names for s in shards))
        if summary.num_present < len(shards):
            content = make_content()
            summary = build_shards(build, content, world)
        manifest = finish_set(build, existing, catalog, describe)
    return BuiltSet(manifest, summary)


Batch = TypeVar("Batch")
Result = TypeVar("Result")


class EncodedRecord(NamedTuple):
    """One record as `ShardWriter.write` takes it."""

    key: str
    record: bytes
    sidecar: bytes | None = None
    noise_digest: int | None = None


class ShardContent(Protocol[Batch, Result]):
    """What a builder knows of its set; each method runs in a thread of its own.

    The batches of a shard, their order and the order of the keys depend on the shard alone,
    never on who builds it or what was built before.
    """

    def accepts(self, index: ShardIndex) -> bool:
        """Whether a tar found under the shard's name holds this shard's keys."""
        ...

    def read(self, shard: PlannedShard) -> Iterator[Batch]:
        """Yield the batches of a shard; in the reading thread, one shard ahead."""
        ...

    def compute(self, batch: Batch) -> Result:
        """Run the model on one batch; in the main thread."""
        ...

    def encode(self, result: Result, header: RecordHeader) -> Iterator[EncodedRecord]:
        """Yield the records of one result, keys ascending; in the writing thread."""
        ...


@dataclass
class BuildSummary:
    """What one worker did for a set."""

    num_shards: int = 0
    """Shards that the set has."""
    num_present: int = 0
    """Shards that were committed before this worker started."""
    num_built: int = 0
    """Shards that this worker built and committed."""
    num_records: int = 0
    """Records in the shards that this worker built, duplicates included."""
    num_adopted: int = 0
    """Tars that a dead worker left without an index, committed as they were."""
    num_taken_over: int = 0
    """Claims taken over from dead or slow workers."""
    num_duplicates: int = 0
    """Shards that another worker had committed first."""
    num_differing_duplicates: int = 0
    """Duplicates with other bytes: from another kind of GPU, or other library versions."""
    num_dropped: int = 0
    """Shards given up because what was staged had been removed."""
    seconds: float = 0.0

    @property
    def records_per_second(self) -> float:
        """The rate of this worker."""
        return self.num_records / self.seconds if self.seconds else 0.0


def build_shards(
    build: SetBuild, content: ShardContent[Batch, Result], world: World
) -> BuildSummary:
    """Build what is missing, together with all other workers, until everything is committed.

    Args:
        build: this worker's part; the set's `set.json` exists already.
        content: the content of the shards.
        world: this worker among those of its launch; rank 0 shows the progress of all.

    Raises:
        Preempted: when asked to stop; this worker's claims and temporary files are removed.
        CorruptError: when a tar without an index is damaged or belongs to another set.
        StorageError: when the disk is full or refuses, or the set was withdrawn.
        BaseException: whatever `content` raises; nothing of the shard is committed then.
    """
    num_records = {str(shard.name): shard.num_records for shard in build.shards}
    progress = nullcontext()
    if world.is_main:
        progress = shown_progress(build.directory, build.queue, num_records)
    with progress:
        return _ShardWorker(build, content, world).run()


class _Claimed(NamedTuple):
    claim: Claim
    shard: PlannedShard
    header: RecordHeader


class _End:
    """Follows the last batch of a shard."""


_END = _End()


class _ShardWorker(Generic[Batch, Result]):
    """The three stages of one worker."""

    def __init__(self, build: SetBuild, content: ShardContent[Batch, Result], world: World) -> None:
        self._build = build
        self._directory, self._queue, self._stop = build.directory, build.queue, build.stop
        self._shards = {str(shard.name): shard for shard in build.shards}
        self._content = content
        self._world = world
        self._where = build.directory.where()
        self._summary = BuildSummary(num_shards=len(build.shards))

    def run(self) -> BuildSummary:
        started = time.monotonic()
        names = self._directory.names()
        self._summary.num_present = sum(shard.name.idx in names for shard in self._shards.values())
        run_pipeline(self._read, self._compute, self._write, on_failure=self._stop.request)
        self._summary.seconds = time.monotonic() - started
        return self._summary

    def _read(self) -> Iterator[tuple[_Claimed, Batch | _End]]:
        units, stop = list(self._shards), self._stop
        for claim in self._queue.claim_units(units, self._world, lambda: stop.requested):
            self._summary.num_taken_over += claim.taken_over
            claimed = self._claimed(claim)
            if self._adopt(claimed):
                continue
            for batch in self._content.read(claimed.shard):
                self._stop.check(self._where)
                yield claimed, batch
            yield claimed, _END
        self._stop.check(self._where)

    def _compute(self, step: tuple[_Claimed, Batch | _End]) -> tuple[_Claimed, Result | _End]:
        self._stop.check(self._where)
        claimed, batch = step
        return claimed, batch if isinstance(batch, _End) else self._content.compute(batch)

    def _write(self, steps: Iterable[tuple[_Claimed, Result | _End]]) -> None:
        remaining = iter(steps)
        for claimed, first in remaining:
            self._write_shard(claimed, _until_end(first, remaining))

    def _write_shard(self, claimed: _Claimed, results: Iterator[Result]) -> None:
        name, heartbeat = claimed.shard.name, self._queue.heartbeat
        num_records, committed = 0, False
        try:
            with self._directory.stage() as tar:
                writer = ShardWriter(tar, name, claimed.header)
                for result in results:
                    num_before = num_records
                    for encoded in self._content.encode(result, claimed.header):
                        writer.write(*encoded)
                        num_records += 1
                    heartbeat.finish_records(num_records - num_before)
                index = writer.close()
                published = commit_shard(self._build.folder, tar, index, self._content.accepts)
            committed = True
            self._count(num_records, index, published)
        except LostDirectoryError:
            # Another worker took this one for dead while it slept, and cleaned up after it. The
            # queue offers the shard again, unless another worker has built it meanwhile.
            self._summary.num_dropped += 1
            for _ in results:
                pass
        finally:
            heartbeat.settle_records(num_records)
            self._queue.release(claimed.claim, committed=committed)

    def _count(self, num_records: int, index: ShardIndex, published: ShardIndex) -> None:
        self._summary.num_records += num_records
        if published is index:
            self._summary.num_built += 1
        else:
            self._summary.num_duplicates += 1
            self._summary.num_differing_duplicates += published.tar_sha256 != index.tar_sha256

    def _claimed(self, claim: Claim) -> _Claimed:
        shard = self._shards[claim.unit]
        return _Claimed(claim, shard, shard_header(self._build.identity, shard))

    def _adopt(self, claimed: _Claimed) -> bool:
        """Commit the tar that a dead worker left without its index, if there is one."""
        name, accepts = claimed.shard.name, self._content.accepts
        if adopt_shard(self._build.folder, name, claimed.header, accepts) is None:
            return False
        self._summary.num_adopted += 1
        self._queue.release(claimed.claim, committed=False)
        return True


def _until_end(
    first: Result | _End, steps: Iterator[tuple[_Claimed, Result | _End]]
) -> Iterator[Result]:
    """Yield the results of one shard; take its end from the stream too, but nothing more."""
    result = first
    while not isinstance(result, _End):
        yield result
        _, result = next(steps)
