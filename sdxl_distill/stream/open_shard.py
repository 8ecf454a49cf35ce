"""An open shard: one shard in every joined set, kept in as little memory as a batch's rows need.

A bucket has some hundred shards in use at once, so a join keeps thousands open. An open shard
holds the ids once, the digests of what is read, and the records on which its sets disagree;
anything else is read from the indices again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from sdxl_distill.shards.digest import bytes_digest
from sdxl_distill.shards.index import UInt64
from sdxl_distill.shards.reader import SpanReader
from sdxl_distill.shards.shard_set import ShardSet
from sdxl_distill.stream.alignment import AlignedShard
from sdxl_distill.stream.draw_parameters import (
    DRAW_TENSORS,
    TEXT_TENSORS,
    DrawParameters,
    differing_records,
)

MOST_BYTES: Final = 1 << 30
"""Most memory that open shards take; what is not kept is read again when it is needed."""

_ID_BYTES: Final = 16
_DIGEST_BYTES: Final = 8
_OBJECT_BYTES: Final = 2_500
"""Size of Python's objects for a shard in one set, its open file included; measured."""


class TensorSpan(NamedTuple):
    """Tensors that lie side by side in the records of a set, so that one call reads them.

    Attributes:
        shard_set: the set that holds them.
        first_column: number of the first tensor in the header of a record.
        batch_columns: numbers of a batch's tensors that they fill, see `Join._batch_columns`.
    """

    shard_set: ShardSet
    first_column: int
    batch_columns: tuple[int, ...]


class OpenShard(NamedTuple):
    """A shard in one draw, and the records on which its sets disagree.

    Attributes:
        spans: readers in the order of the join's spans.
        ids: uint8 [n, 16], image ids.
        draws: uint64 [n, 3], digests of seed, timestep and noise in the first predictions
            set.
        unequal_draws: records for which the predictions sets have different digests of these.
        unequal_texts: set of the same text encoders → records whose text has other digests than
            the text that is read; only sets with such records.
    """

    spans: tuple[SpanReader, ...]
    ids: npt.NDArray[np.uint8]
    draws: UInt64
    unequal_draws: frozenset[int]
    unequal_texts: Mapping[ShardSet, frozenset[int]]

    def image_id(self, record: int) -> str:
        """Return the image id of a record, 32 hex digits."""
        return self.ids[record].tobytes().hex()

    def every_teacher_used(
        self, record: int, parameters: DrawParameters, noise_digest: int | None
    ) -> bool:
        """Whether every teacher used these parameters and this noise, by the digests.

        Args:
            record: number of the record in the shard.
            parameters: seed and timestep that follow from its id.
            noise_digest: digest of the noise in the batch; None where that was read from one of
                the sets, so that sets which agree with each other agree with the batch.
        """
        if record in self.unequal_draws:
            return False
        seed, timestep, noise = self.draws[record].tolist()
        return (
            seed == bytes_digest(parameters.seed.to_bytes(8, "little"))
            and timestep == bytes_digest(parameters.timestep.to_bytes(8, "little"))
            and noise_digest in (noise, None)
        )


def open_shard(
    shard: AlignedShard,
    draw: int,
    spans: Sequence[TensorSpan],
    predictions: Sequence[ShardSet],
    text: ShardSet,
    other_texts: Sequence[ShardSet],
) -> OpenShard:
    """Open a shard in every set, and compare the indices of all its records at once.

    Args:
        shard: a shard that all sets have.
        draw: number of the predictions' draw.
        spans: the spans to read.
        predictions: the sets of all teachers.
        text: the set whose text is read.
        other_texts: other sets with text of the same encoders.

    Raises:
        CorruptError, StorageError: as `ShardSet.reader`.
    """
    # One reader for each set.
    names = {
        each: shard.name(each, draw)
        for each in dict.fromkeys([*predictions, text, *(span.shard_set for span in spans)])
    }
    readers = {each: each.open_reader(name) for each, name in names.items()}

    # The records on which the sets disagree.
    teachers = [readers[teacher].index for teacher in predictions]
    first = teachers[0]
    texts = {
        other: differing_records((readers[text].index, readers[other].index), TEXT_TENSORS)
        for other in other_texts
    }

    # Keep only what rows need; the rest is read again by name.
    return OpenShard(
        spans=tuple(
            SpanReader(
                readers[span.shard_set],
                span.first_column,
                len(span.batch_columns),
                partial(span.shard_set.reader, names[span.shard_set]),
            )
            for span in spans
        ),
        ids=first.ids.copy(),
        draws=np.stack([first.tensor_digests(name) for name in DRAW_TENSORS], axis=1),
        unequal_draws=differing_records(teachers, DRAW_TENSORS),
        unequal_texts={other: records for other, records in texts.items() if records},
    )


class Room(NamedTuple):
    """Bounds on what is kept open.

    Attributes:
        num_shards: largest number of open shards.
        num_bytes: approximate memory that they take.
        num_files: their files, over all sets.
    """

    num_shards: int
    num_bytes: int
    num_files: int


def room_for(
    spans: Sequence[TensorSpan], shards: Sequence[AlignedShard], num_in_use: int, num_draws: int = 1
) -> Room:
    """Return the room for the shards in use at once, and for some that take their place.

    Args:
        spans: the spans read from a shard.
        shards: all joined shards.
        num_in_use: number of them in use at once, each draw counted.
        num_draws: number of draws of each shard.
    """
    num_sets = len({span.shard_set for span in spans})
    num_digests = len(DRAW_TENSORS) + sum(len(span.batch_columns) for span in spans)
    # Offsets differ by record where there are sidecars: in the latents set.
    bytes_per_record = _ID_BYTES + _DIGEST_BYTES * (num_digests + 1)
    mean_records = sum(shard.num_records for shard in shards) / len(shards)
    bytes_per_shard = int(bytes_per_record * mean_records) + _OBJECT_BYTES * num_sets
    wanted = min(len(shards) * num_draws, num_in_use + num_in_use // 4)
    num_shards = max(1, min(wanted, MOST_BYTES // bytes_per_shard))
    return Room(num_shards, num_shards * bytes_per_shard, num_shards * num_sets)
