"""The loader: one rank's batches of joined records, in the stream order.

Threads read ahead, not processes: reads and digests release the GIL, and nothing has to be copied
from one process to another. Their number affects nothing but speed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import chain, count

from sdxl_distill.core.noise_schedule import NoiseSchedule, PredictionType
from sdxl_distill.order.shard_table import ShardTable
from sdxl_distill.order.stream_order import PlannedBatch, StreamOrder
from sdxl_distill.runtime.world import World
from sdxl_distill.shards.shard_set import ShardSet
from sdxl_distill.storage.open_file import OPEN_FILES
from sdxl_distill.stream.alignment import AlignedShard, OnMissing, align
from sdxl_distill.stream.batch import BatchMemory, JoinedBatch
from sdxl_distill.stream.join import Join
from sdxl_distill.stream.joined_sets import JoinedSets, noise_schedule_of
from sdxl_distill.stream.open_shard import Room
from sdxl_distill.stream.read_ahead import ReadAhead
from sdxl_distill.stream.validation_split import num_held_out, validation_reads

_log = logging.getLogger(__name__)


class JoinedStream:
    """The joined records of many teachers, as batches for one rank; use as a context or `close`.

    ```
    teachers = [open_shard_set(f"cache/teacher_predictions/{name}") for name in ("a", "b")]
    with JoinedStream(teachers, global_batch=16) as stream:
        for batch in stream.epoch(0):
            batch.latents, batch.noise, batch.timesteps, batch.predictions
    ```

    The constructor reads manifests, and with a validation split a few indices; it refuses what
    cannot be joined. Do not pass the stream to `accelerator.prepare`: it already yields only this
    rank's share.

    Args:
        predictions: one set of each teacher; the caller closes them.
        latents: the latents set; None opens the one that the predictions refer to.
        text: the text set; None finds one, see `JoinedSets.resolve`.
        text_fingerprint: fingerprint of the text encoders whose embeddings the batches hold; None
            takes those of the first set.
        global_batch: G, records of one step over all ranks.
        seed: the stream order's seed, 0 … 2⁶⁴ − 1.
        lanes: C; None is the largest divisor of G up to 64. The world size must divide it.
        window: W, number of records of a bucket that are mixed with each other.
        validation_fraction: share of the images that is held out, by their ids.
        on_missing: `error` refuses shards that some set lacks, `intersect` leaves them out.
        world: the rank whose share of each global batch is read.
        num_threads: number of reading threads besides the caller, which also reads instead of
            waiting.
        prefetch: number of this rank's batches that are read ahead.
        pin_memory: true for batches in page-locked memory.

    Attributes:
        order: the stream order.
        num_validation_records: number of held-out records, over all ranks.

    Raises:
        ConfigError: when sets are not there or of the wrong kind, or a number is out of range.
        IncompatibleError: when sets do not belong together; says which, in what, and what to do.
        CorruptError, StorageError: when a manifest or index cannot be read.
    """

    def __init__(
        self,
        predictions: Sequence[ShardSet],
        *,
        global_batch: int,
        latents: ShardSet | None = None,
        text: ShardSet | None = None,
        text_fingerprint: str | None = None,
        seed: int = 42,
        lanes: int | None = None,
        window: int = 16384,
        validation_fraction: float = 0.0,
        on_missing: OnMissing = "error",
        world: World | None = None,
        num_threads: int = 4,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        self._sets = JoinedSets.resolve(
            predictions, latents=latents, text=text, text_fingerprint=text_fingerprint
        )
        shards = align(self._sets, on_missing)
        table = _shard_table(self._sets.latents, shards, validation_fraction)
        self.order = StreamOrder(
            table,
            seed=seed,
            global_batch=global_batch,
            lanes=lanes,
            window=window,
            num_draws=self._sets.num_draws,
        )
        self._world = world or World()
        self._planned(0, 0, 0)  # refuses an impossible world now
        self.num_validation_records = int(table.first.sum())
        self._opened = [
            each for each in self._sets.all if each not in {*predictions, latents, text}
        ]
        # One batch is in use, and the next may be requested before that one is dropped.
        memory = BatchMemory(max_free=prefetch + 2, pin_memory=pin_memory)
        num_in_use = self.order.num_shards_in_use(self._world.size)
        self._join = Join(self._sets, shards, memory, num_in_use=num_in_use)
        self._ahead = ReadAhead(self._join, num_threads=num_threads, num_batches=prefetch)
        if self._world.is_main:
            _report_small_buckets(self.order)
            _report_room(self._join.room, len(shards) * self._sets.num_draws)

    @property
    def teacher_ids(self) -> tuple[str, ...]:
        """Ids of the predictions sets, in the order of `JoinedBatch.predictions`."""
        return tuple(shard_set.id for shard_set in self._sets.predictions)

    @property
    def noise_schedules(self) -> tuple[NoiseSchedule, ...]:
        """Noise schedule of each teacher; all have one ᾱ table."""
        return tuple(noise_schedule_of(shard_set) for shard_set in self._sets.predictions)

    @property
    def prediction_types(self) -> tuple[PredictionType, ...]:
        """What each teacher predicts."""
        return tuple(schedule.prediction_type for schedule in self.noise_schedules)

    @property
    def table_fingerprint(self) -> str:
        """Fingerprint of the ᾱ table, which must be the student's too."""
        return self.noise_schedules[0].table_fingerprint()

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of every joined set by its id, latents and text included."""
        return {each.id: each.manifest.identity.fingerprint for each in self._sets.all}

    def epoch(self, epoch: int, step: int = 0) -> Iterator[JoinedBatch]:
        """Return this rank's batches of an epoch, from a step on.

        Raises:
            IncompatibleError: at the call, when the epoch has fewer steps.
            CorruptError, IncompatibleError, StorageError: at the batch whose records are damaged
                or do not belong together.
        """
        return self._ahead.batches(self._reads(epoch, step))

    def forever(self, epoch: int = 0, step: int = 0) -> Iterator[JoinedBatch]:
        """Return this rank's batches from a position on, epoch after epoch, endlessly.

        Reading ahead goes on across the end of an epoch. Raises as `epoch`.
        """
        rest = (self._reads(later, 0) for later in count(epoch + 1))
        return self._ahead.batches(chain(self._reads(epoch, step), chain.from_iterable(rest)))

    def validation_batches(
        self, batch_size: int, max_records: int | None = None
    ) -> Iterator[JoinedBatch]:
        """Return this rank's share of the held-out records, in draw 0.

        The order is fixed; all ranks' shares are every held-out record once. Ranks may have
        different numbers of batches, even none.

        Args:
            batch_size: largest number of records in one batch.
            max_records: most records of all ranks together, the same at every call; None for all.

        Raises:
            CorruptError, IncompatibleError, StorageError: as `epoch`.
        """
        table, world = self.order.table, self._world
        return self._ahead.batches(
            validation_reads(table, batch_size, max_records, rank=world.rank, world=world.size)
        )

    def close(self) -> None:
        """Stop reading ahead, wait for the threads, and close the sets that were opened here."""
        self._ahead.close()
        self._join.close()
        for shard_set in self._opened:
            shard_set.close()

    def __enter__(self) -> JoinedStream:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _reads(self, epoch: int, step: int) -> Iterator[PlannedBatch]:
        return self._planned(epoch, step, self.order.steps(epoch))

    def _planned(self, epoch: int, step: int, stop: int) -> Iterator[PlannedBatch]:
        world = self._world
        return self.order.batches(epoch, step, stop, rank=world.rank, world=world.size)


def _shard_table(latents: ShardSet, shards: Sequence[AlignedShard], fraction: float) -> ShardTable:
    """Return the table whose row i is `shards[i]` without its held-out records."""
    held_out = [num_held_out(latents, shard, fraction) for shard in shards]
    return ShardTable.from_rows(
        (shard.bucket.width, shard.bucket.height, shard.number, first, shard.num_records - first)
        for shard, first in zip(shards, held_out, strict=True)
    )


def _report_room(room: Room, num_shards: int) -> None:
    _log.info(
        "the join keeps %d of %d shards (times draws) open: %d files of at most %d, %.1f MB",
        room.num_shards,
        num_shards,
        room.num_files,
        OPEN_FILES.most_open,
        room.num_bytes / 1e6,
    )


def _report_small_buckets(order: StreamOrder) -> None:
    for part in order.describe():
        if part.smaller_than_batch and part.num_records:
            _log.warning(
                "bucket %dx%d has %d records, fewer than the global batch of %d: it has no step "
                "in some epochs",
                *part.bucket,
                part.num_records,
                order.global_batch,
            )
