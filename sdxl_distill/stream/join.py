"""The join: copies the records of one key from all sets into the rows of a batch.

Aligned shards are walked by number; nothing is searched. What all sets hold alike is read once,
and the digests in the indices of the others prove it equal. Rows are independent, so any number
of threads may fill one batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import torch

from sdxl_distill.core.noise import noise
from sdxl_distill.shards.digest import tensor_digest
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.reader import ShardReader
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.safetensors_layout import TORCH_DTYPES, byte_view
from sdxl_distill.shards.shard_set import ShardSet
from sdxl_distill.stream.alignment import AlignedShard
from sdxl_distill.stream.batch import JoinedBatch
from sdxl_distill.stream.compatibility import holds_text, recipe_of, text_fingerprint_of
from sdxl_distill.stream.joined_sets import JoinedSets
from sdxl_distill.stream.question import (
    QUESTION_TENSORS,
    TEXT_TENSORS,
    differing_records,
    expected_question,
    require_close_text,
    require_noise,
    require_question,
)
from sdxl_distill.stream.schedule import Batch

_MAX_OPEN_SHARDS: Final = 128


class Column(NamedTuple):
    """One tensor of a batch: the set that fills it, and its name there."""

    shard_set: ShardSet
    tensor_name: str


class Run(NamedTuple):
    """Columns whose tensors lie side by side in the records of a set: one call reads them."""

    shard_set: ShardSet
    first_place: int
    columns: tuple[Column, ...]


class OpenShard(NamedTuple):
    """A shard in one draw, open in every set, and where its sets do not agree.

    Attributes:
        readers: of every set.
        questions: indices of the predictions sets.
        unequal_questions: records for which the digests of these are not all equal.
        unequal_texts: set of the same text encoders → records whose text has other digests than
            the text that is read.
    """

    readers: Mapping[ShardSet, ShardReader]
    questions: Sequence[ShardIndex]
    unequal_questions: frozenset[int]
    unequal_texts: Mapping[ShardSet, frozenset[int]]


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
        self._runs = [run for each in sets.all for run in _runs(each, self._columns())]
        self._open = lru_cache(_MAX_OPEN_SHARDS)(self._open_shard)

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
        contents = dict(zip(self._columns(), map(byte_view, self._tensors(batch)), strict=True))
        runs = [
            (run, [(contents[each], len(contents[each]) // len(batch)) for each in run.columns])
            for run in self._runs
        ]
        shards, records, draws = read.shards.tolist(), read.records.tolist(), read.draws.tolist()
        keys: list[str] = []
        for row in rows:
            record = records[row]
            shard = self._open(shards[row], draws[row])
            for run, parts in runs:
                buffers = [
                    content[row * num_bytes : (row + 1) * num_bytes] for content, num_bytes in parts
                ]
                shard.readers[run.shard_set].read_run(record, run.first_place, buffers)
            self._fill_question(batch, row, shard, record, draws[row])
            keys.append(shard.readers[self._sets.latents].index.key(record))
        return keys

    def close(self) -> None:
        """Let go of the shards that are kept open."""
        self._open.cache_clear()

    def _columns(self) -> list[Column]:
        """Return what is read, in the order of `_tensors`."""
        latents, text = self._sets.latents, self._sets.text
        columns = [
            Column(latents, "latents"),
            Column(latents, "time_ids"),
            Column(text, "encoder_hidden_states"),
            Column(text, "pooled_embeds"),
            *(Column(teacher, "teacher_pred") for teacher in self._sets.predictions),
        ]
        if self._noise_source is not None:
            columns.append(Column(self._noise_source, "noise"))
        return columns

    def _tensors(self, batch: JoinedBatch) -> list[torch.Tensor]:
        """Return the tensors of a batch that are read, in the order of `_columns`."""
        tensors = [
            batch.latents,
            batch.time_ids,
            batch.encoder_hidden_states,
            batch.pooled_embeds,
            *batch.predictions,
        ]
        if self._noise_source is not None:
            tensors.append(batch.noise)
        return tensors

    def _open_shard(self, row: int, draw: int) -> OpenShard:
        """Open a row of the shard table, and compare the indices of all its records at once."""
        shard, sets = self._shards[row], self._sets
        readers = {each: each.reader(shard.name(each, draw)) for each in sets.all}
        questions = [readers[teacher].index for teacher in sets.predictions]
        text = readers[sets.text].index
        return OpenShard(
            readers,
            questions,
            differing_records(questions, QUESTION_TENSORS),
            {
                other: differing_records((text, readers[other].index), TEXT_TENSORS)
                for other in self._other_texts
            },
        )

    def _fill_question(
        self, batch: JoinedBatch, row: int, shard: OpenShard, record: int, draw: int
    ) -> None:
        """Fill in what follows from the id, and check that every teacher was asked the same."""
        first = shard.questions[0]
        question = expected_question(first.image_id(record), self._recipe, draw)
        batch.timesteps.numpy()[row] = question.timestep
        if self._noise_source is None:
            made = noise(question.seed, *batch.bucket, batch.noise.shape[1])
            batch.noise.numpy()[row] = made
            origin, noise_digest = "the seed", tensor_digest(made)
        else:
            source = shard.readers[self._noise_source].index
            origin = f"set {self._noise_source.id}"
            noise_digest = int(source.tensor_digests("noise")[record])
        # What holds for one index holds for all whose digests are equal.
        asked = shard.questions if record in shard.unequal_questions else [first]
        for index in asked:
            require_question(index, record, question)
            require_noise(index, record, noise_digest, origin)
        for other, records in shard.unequal_texts.items():
            if record in records:
                readers = shard.readers
                require_close_text(readers[self._sets.text], readers[other], record)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._pin_memory)


def _runs(shard_set: ShardSet, columns: Sequence[Column]) -> list[Run]:
    """Return the columns of one set, in as few runs as their places in a record allow."""
    record = shard_set.manifest.record
    bucket = shard_set.manifest.shards[0]
    # The order of the tensors is the same in every bucket.
    places = RecordHeader.build(record.schema, bucket.width, bucket.height, record.fingerprint).places
    runs: list[Run] = []
    for number, place in enumerate(places):
        column = Column(shard_set, place.name)
        if column not in columns:
            continue
        if runs and runs[-1].first_place + len(runs[-1].columns) == number:
            runs[-1] = runs[-1]._replace(columns=(*runs[-1].columns, column))
        else:
            runs.append(Run(shard_set, number, (column,)))
    return runs
