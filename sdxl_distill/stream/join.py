"""The join: copies the records of one key from all sets into the rows of a batch.

Aligned shards are walked by number; nothing is searched. What all sets have in common is read
once, and the digests in the other sets' indices prove it equal. Rows are independent, so any number
of threads may fill one batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import torch

from sdxl_distill.core.bucket import Bucket
from sdxl_distill.core.image_id import record_key
from sdxl_distill.core.noise import noise
from sdxl_distill.order.stream_order import PlannedBatch
from sdxl_distill.shards.digest import tensor_digest
from sdxl_distill.shards.reader import ShardReader
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.safetensors_layout import TORCH_DTYPES, byte_view
from sdxl_distill.shards.shard_set import ShardSet
from sdxl_distill.stream.alignment import AlignedShard
from sdxl_distill.stream.batch import BatchLayout, BatchMemory, JoinedBatch
from sdxl_distill.stream.draw_parameters import (
    DrawParameters,
    expected_draw,
    require_close_text,
    require_draw,
    require_noise,
)
from sdxl_distill.stream.joined_sets import JoinedSets, holds_text, recipe_of, text_fingerprint_of
from sdxl_distill.stream.open_shard import OpenShard, TensorSpan, open_shard, room_for

_MAX_LAYOUTS: Final = 128


class UnfilledBatch(NamedTuple):
    """A batch of its final shape, whose rows and keys are still to come.

    Attributes:
        batch: its tensors look into `content`.
        read: the records to read.
        layout: the layout of the tensors in `content`.
        content: the batch's memory.
    """

    batch: JoinedBatch
    read: PlannedBatch
    layout: BatchLayout
    content: memoryview


class Join:
    """Reads batches of joined records; safe to share between threads.

    Args:
        sets: the joined sets.
        shards: the shards that all sets have, one for each row of the order's shard table.
        memory: the memory that batches lie in.
        num_in_use: number of shards read from at once, over all buckets and draws.

    Attributes:
        room: the bounds on what is kept open.
    """

    def __init__(
        self,
        sets: JoinedSets,
        shards: Sequence[AlignedShard],
        memory: BatchMemory,
        *,
        num_in_use: int,
    ) -> None:
        self._sets = sets
        self._shards = shards
        self._memory = memory
        self._recipe = recipe_of(sets.predictions[0])
        full = [each for each in sets.predictions if holds_text(each)]
        self._noise_source = full[0] if full else None
        self._other_texts = [
            each
            for each in full
            if each is not sets.text and text_fingerprint_of(each) == text_fingerprint_of(sets.text)
        ]
        batch_columns = self._batch_columns()
        self._spans = [span for each in sets.all for span in _spans(each, batch_columns)]
        self._layout = lru_cache(_MAX_LAYOUTS)(self._new_layout)
        self.room = room_for(self._spans, shards, num_in_use, sets.num_draws)
        self._open = lru_cache(self.room.num_shards)(self._open_shard)
        # Prefetch hints cost 10 % of the time when every read is served from memory.
        self._waits_for_disk = True

    def allocate(self, read: PlannedBatch) -> UnfilledBatch:
        """Return a batch for `fill`."""
        bucket = self._shards[read.shards[0]].bucket
        layout = self._layout(bucket, len(read.positions))
        block = self._memory.take(layout)
        latents, time_ids, hidden_states, pooled, *predictions, own_noise, timesteps = block.tensors
        batch = JoinedBatch(
            epoch=read.epoch,
            step=read.step,
            bucket=bucket,
            keys=("",) * len(read.positions),
            draws=tuple(read.draws.tolist()),
            latents=latents,
            noise=own_noise,
            timesteps=timesteps,
            predictions=tuple(predictions),
            encoder_hidden_states=hidden_states,
            pooled_embeds=pooled,
            time_ids=time_ids,
        )
        return UnfilledBatch(batch, read, layout, block.content)

    def fill(self, unfilled: UnfilledBatch, rows: Sequence[int]) -> list[str]:
        """Read some rows of a batch in place.

        Args:
            unfilled: a batch that `allocate` returned.
            rows: positions in the batch; no other call may fill the same ones.

        Returns:
            the keys of these rows.

        Raises:
            CorruptError: when bytes are damaged, or a seed or timestep does not follow from the id.
            IncompatibleError: when two sets hold different noise or text for one record.
            StorageError: when a set was replaced, or the operating system refuses.
        """
        # Where each span's tensors lie in the batch's memory.
        batch, read, layout, content = unfilled
        shards, records, draws = read.shards.tolist(), read.records.tolist(), read.draws.tolist()
        places = [(place.offset, place.row_bytes) for place in layout.places]
        spans = [
            [places[batch_column] for batch_column in span.batch_columns] for span in self._spans
        ]

        # Hint all rows to the disk, unless the last rows were all in memory.
        if self._waits_for_disk:
            self._announce(read, rows)

        # Copy row by row from all sets, and check each against its id.
        was_cached = True
        keys: list[str] = []
        for row in rows:
            record, draw = records[row], draws[row]
            shard = self._open(shards[row], draw)
            for span, own_spans in zip(shard.spans, spans, strict=True):
                buffers = [
                    content[offset + row * size : offset + (row + 1) * size]
                    for offset, size in own_spans
                ]
                was_cached &= span.read(record, buffers)
            image_id = shard.image_id(record)
            parameters = expected_draw(image_id, self._recipe, draw)
            self._fill_draw(unfilled, row, shard, parameters)
            keys.append(record_key(image_id, *batch.bucket))
        self._waits_for_disk = not was_cached
        return keys

    def close(self) -> None:
        """Let go of the shards that are kept open."""
        self._open.cache_clear()

    def _announce(self, read: PlannedBatch, rows: Sequence[int]) -> None:
        """Let the disk start on all rows while the first are being read."""
        for row in rows:
            shard = self._open(int(read.shards[row]), int(read.draws[row]))
            for span in shard.spans:
                span.announce(int(read.records[row]))

    def _batch_columns(self) -> dict[tuple[ShardSet, str], int]:
        """Return the number, in a batch, of each tensor that is read; see `_new_layout`."""
        sets = self._sets
        names = [
            (sets.latents, "latents"),
            (sets.latents, "time_ids"),
            (sets.text, "encoder_hidden_states"),
            (sets.text, "pooled_embeds"),
            *((teacher, "teacher_pred") for teacher in sets.predictions),
        ]
        if self._noise_source is not None:
            names.append((self._noise_source, "noise"))
        return {name: batch_column for batch_column, name in enumerate(names)}

    def _new_layout(self, bucket: Bucket, num_records: int) -> BatchLayout:
        """Lay out what is read in the order of `_batch_columns`, then noise and timesteps."""
        tensors: list[tuple[torch.dtype, tuple[int, ...], int]] = []
        for shard_set, name in self._batch_columns():
            place = _header(shard_set, bucket).place(name)
            tensors.append((TORCH_DTYPES[place.dtype], (num_records, *place.shape), place.offset))
        if self._noise_source is None:
            latents_shape = tensors[0][1]
            tensors.append((torch.float16, latents_shape, 0))
        return BatchLayout.of([*tensors, (torch.int64, (num_records,), 0)])

    def _open_shard(self, row: int, draw: int) -> OpenShard:
        """Open the shard of one row of the shard table."""
        sets = self._sets
        return open_shard(
            self._shards[row], draw, self._spans, sets.predictions, sets.text, self._other_texts
        )

    def _fill_draw(
        self, unfilled: UnfilledBatch, row: int, shard: OpenShard, parameters: DrawParameters
    ) -> None:
        """Fill in what follows from the id, and check that every teacher used the same."""
        batch, record = unfilled.batch, int(unfilled.read.records[row])
        timesteps = unfilled.layout.places[-1].row(row)
        unfilled.content[timesteps] = parameters.timestep.to_bytes(8, "little")
        noise_digest = None
        if self._noise_source is None:
            made = noise(parameters.seed, *batch.bucket, batch.noise.shape[1])
            unfilled.content[unfilled.layout.places[-2].row(row)] = byte_view(made)
            noise_digest = tensor_digest(made)
        if not shard.every_teacher_used(record, parameters, noise_digest):
            self._require_draw(unfilled.read, row, parameters, noise_digest)
        for other, records in shard.unequal_texts.items():
            if record in records:
                text = self._reader(self._sets.text, unfilled.read, row)
                require_close_text(text, self._reader(other, unfilled.read, row), record)

    def _require_draw(
        self, read: PlannedBatch, row: int, parameters: DrawParameters, noise_digest: int | None
    ) -> None:
        """Raise for the first teacher whose index shows another seed, timestep or noise."""
        record, origin = int(read.records[row]), "the seed"
        if noise_digest is None:
            assert self._noise_source is not None
            origin = f"set {self._noise_source.id}"
            index = self._reader(self._noise_source, read, row).index
            noise_digest = index.tensor_digest("noise", record)
        for teacher in self._sets.predictions:
            index = self._reader(teacher, read, row).index
            require_draw(index, record, parameters)
            require_noise(index, record, noise_digest, origin)

    def _reader(self, shard_set: ShardSet, read: PlannedBatch, row: int) -> ShardReader:
        """Return a reader with the shard's whole index, for rare checks."""
        shard = self._shards[int(read.shards[row])]
        return shard_set.reader(shard.name(shard_set, int(read.draws[row])))


def _spans(
    shard_set: ShardSet, batch_columns: Mapping[tuple[ShardSet, str], int]
) -> list[TensorSpan]:
    """Return what is read of one set, in as few spans as the record's layout allows."""
    # The order of the tensors is the same in every bucket.
    header = _header(shard_set, Bucket(*shard_set.manifest.shards[0][:2]))
    spans: list[TensorSpan] = []
    for column, place in enumerate(header.places):
        batch_column = batch_columns.get((shard_set, place.name))
        if batch_column is None:
            continue
        if spans and spans[-1].first_column + len(spans[-1].batch_columns) == column:
            spans[-1] = spans[-1]._replace(batch_columns=(*spans[-1].batch_columns, batch_column))
        else:
            spans.append(TensorSpan(shard_set, column, (batch_column,)))
    return spans


def _header(shard_set: ShardSet, bucket: Bucket) -> RecordHeader:
    """Return a header of one bucket; its shards' headers differ only in the source's digest."""
    identity, source = shard_set.manifest.identity, shard_set.manifest.shards[0].source_sha256
    return RecordHeader.build(identity.schema, *bucket, identity.fingerprint, source)
