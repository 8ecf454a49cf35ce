"""The join: copies the records of one key from all sets into the rows of a batch.

Aligned shards are walked by number; nothing is searched. What all sets hold alike is read once,
and the digests in the indices of the others prove it equal. Rows are independent, so any number
of threads may fill one batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from sdxl_distill.core.noise import noise
from sdxl_distill.shards.digest import tensor_digest
from sdxl_distill.shards.reader import ShardReader
from sdxl_distill.shards.safetensors_layout import TORCH_DTYPES, byte_view
from sdxl_distill.shards.shard_set import ShardSet
from sdxl_distill.stream.alignment import AlignedShard
from sdxl_distill.stream.batch import JoinedBatch
from sdxl_distill.stream.compatibility import holds_text, recipe_of, text_fingerprint_of
from sdxl_distill.stream.joined_sets import JoinedSets
from sdxl_distill.stream.question import (
    expected_question,
    require_close_text,
    require_noise,
    require_question,
)
from sdxl_distill.stream.schedule import Batch

Readers = Mapping[ShardSet, ShardReader]


class Column(NamedTuple):
    """One tensor of a batch: the set that fills it, its name there, and the bytes of all rows."""

    shard_set: ShardSet
    tensor_name: str
    content: memoryview

    def read(self, readers: Readers, record: int, row: int, num_rows: int) -> None:
        """Copy the tensor of one record into its row."""
        num_bytes = len(self.content) // num_rows
        out = self.content[row * num_bytes : (row + 1) * num_bytes]
        readers[self.shard_set].read_tensor_into(record, self.tensor_name, out)


class Join:
    """Reads batches of joined records; safe to share between threads.

    Args:
        sets: that are joined.
        shards: that all sets have; rows of the schedule's shard table.
        pin_memory: allocate batches in page-locked memory, from which a GPU copies by itself.
    """

    def __init__(
        self, sets: JoinedSets, shards: Sequence[AlignedShard], *, pin_memory: bool
    ) -> None:
        self._sets = sets
        self._shards = shards
        self._pin_memory = pin_memory
        self._recipe = recipe_of(sets.predictions[0])
        full = [each for each in sets.predictions if holds_text(each)]
        self._noise_source = full[0] if full else None
        self._other_texts = [
            each
            for each in full
            if each is not sets.text and text_fingerprint_of(each) == text_fingerprint_of(sets.text)
        ]

    def allocate(self, read: Batch) -> JoinedBatch:
        """Return a batch of its final shape; tensors and keys wait for `fill`."""
        sets, bucket = self._sets, self._shards[read.shards[0]].bucket

        def empty(shard_set: ShardSet, tensor_name: str) -> torch.Tensor:
            dtype, shape = shard_set.manifest.record.schema.resolve(*bucket)[tensor_name]
            return self._empty((len(read.slots), *shape), TORCH_DTYPES[dtype])

        latents = empty(sets.latents, "latents")
        return JoinedBatch(
            epoch=read.epoch,
            step=read.step,
            bucket=bucket,
            keys=("",) * len(read.slots),
            draws=tuple(read.draws.tolist()),
            latents=latents,
            noise=self._empty(tuple(latents.shape), torch.float16),
            timesteps=self._empty((len(read.slots),), torch.int64),
            predictions=tuple(empty(teacher, "teacher_pred") for teacher in sets.predictions),
            encoder_hidden_states=empty(sets.text, "encoder_hidden_states"),
            pooled_embeds=empty(sets.text, "pooled_embeds"),
            time_ids=empty(sets.latents, "time_ids"),
        )

    def fill(self, batch: JoinedBatch, read: Batch, rows: Sequence[int]) -> list[str]:
        """Read some rows of an allocated batch in place.

        Args:
            batch: from `allocate(read)`.
            read: which records.
            rows: positions in the batch; no other call may fill the same ones.

        Returns:
            the keys of these rows.

        Raises:
            CorruptError: when bytes are damaged, or a seed or timestep is not what the id gives.
            IncompatibleError: when two sets hold different noise or text for one record.
            StorageError: when a set was replaced, or the operating system refuses.
        """
        columns = self._columns(batch)
        keys: list[str] = []
        for row in rows:
            shard = self._shards[read.shards[row]]
            record, draw = int(read.records[row]), int(read.draws[row])
            readers = {each: each.reader(shard.name(each, draw)) for each in self._sets.all}
            for column in columns:
                column.read(readers, record, row, len(batch))
            self._fill_question(batch, row, readers, record, draw)
            keys.append(readers[self._sets.latents].index.key(record))
        return keys

    def _columns(self, batch: JoinedBatch) -> list[Column]:
        latents, text = self._sets.latents, self._sets.text
        columns = [
            Column(latents, "latents", byte_view(batch.latents)),
            Column(latents, "time_ids", byte_view(batch.time_ids)),
            Column(text, "encoder_hidden_states", byte_view(batch.encoder_hidden_states)),
            Column(text, "pooled_embeds", byte_view(batch.pooled_embeds)),
        ]
        columns += [
            Column(teacher, "teacher_pred", byte_view(prediction))
            for teacher, prediction in zip(self._sets.predictions, batch.predictions, strict=True)
        ]
        if self._noise_source is not None:
            columns.append(Column(self._noise_source, "noise", byte_view(batch.noise)))
        return columns

    def _fill_question(
        self, batch: JoinedBatch, row: int, readers: Readers, record: int, draw: int
    ) -> None:
        """Fill in what follows from the id, and check that every teacher was asked the same."""
        indices = [readers[teacher].index for teacher in self._sets.predictions]
        question = expected_question(indices[0].image_id(record), self._recipe, draw)
        batch.timesteps.numpy()[row] = question.timestep
        if self._noise_source is None:
            made = noise(question.seed, *batch.bucket, batch.noise.shape[1])
            batch.noise.numpy()[row] = made
            origin, noise_digest = "the seed", tensor_digest(made)
        else:
            source = readers[self._noise_source].index
            origin = f"set {self._noise_source.id}"
            noise_digest = int(source.tensor_digests("noise")[record])
        for index in indices:
            require_question(index, record, question)
            require_noise(index, record, noise_digest, origin)
        for other in self._other_texts:
            require_close_text(readers[self._sets.text], readers[other], record)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._pin_memory)
