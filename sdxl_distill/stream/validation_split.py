"""The validation split: images that are never trained on, chosen by their ids alone.

An image is held out ⇔ the first 32 bits of its id < fraction · 2³²: the same in every run and for
every set. Keys are sorted, so these records lead each shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from sdxl_distill.order.permutation import Int64s
from sdxl_distill.order.shard_table import ShardTable
from sdxl_distill.order.stream_order import PlannedBatch
from sdxl_distill.shards.shard_set import ShardSet
from sdxl_distill.stream.alignment import AlignedShard


def num_held_out(latents: ShardSet, shard: AlignedShard, fraction: float) -> int:
    """Return how many records at the start of a shard are held out.

    The manifest's first and last key decide for nearly all shards; only a shard that the
    threshold cuts through needs its index.
    """
    threshold = math.ceil(fraction * 2**32)
    name = shard.name(latents, 0)
    entry = latents.manifest.entry(name)
    if entry.first_id is None or entry.last_id is None or _prefix(entry.first_id) >= threshold:
        return 0
    if _prefix(entry.last_id) < threshold:
        return shard.num_records
    prefixes = latents.index(name).ids[:, :4].copy().view(">u4").reshape(-1)
    return int(np.searchsorted(prefixes, threshold))


def validation_reads(
    table: ShardTable,
    batch_size: int,
    max_records: int | None = None,
    *,
    rank: int,
    world: int,
) -> Iterator[PlannedBatch]:
    """Yield what one rank reads to validate: every `world`-th held-out record, in draw 0.

    Args:
        table: the shard table, whose `first` counts each shard's held-out records.
        batch_size: largest number of records in one batch.
        max_records: most records of all ranks together: the first ones of each bucket, as many as
            is its share of all held-out ones. None takes all.
        rank: the rank whose share is read.
        world: number of ranks; all shares together are every record once.
    """
    step = 0
    shares = _bucket_shares(table, max_records)
    for bucket, num_records in enumerate(shares):
        rows = np.flatnonzero((table.bucket == bucket) & (table.first > 0))
        rows = rows[np.argsort(table.number[rows])]
        firsts = table.first[rows]
        mine = np.arange(num_records, dtype=np.int64)[rank::world]
        ends = np.cumsum(firsts)
        places = np.searchsorted(ends, mine, side="right")
        shards, records = rows[places], mine - (ends - firsts)[places]
        for start in range(0, len(mine), batch_size):
            piece = slice(start, start + batch_size)
            yield _draw_0(step, bucket, shards[piece], records[piece])
            step += 1


def _bucket_shares(table: ShardTable, max_records: int | None) -> list[int]:
    """Return how many held-out records of each bucket are read: all, or in proportion.

    Source: the method of largest remainders (Hamilton); ties go to the earlier bucket.
    """
    held_out = [int(table.first[table.bucket == each].sum()) for each in range(len(table.buckets))]
    total = sum(held_out)
    if max_records is None or total <= max_records:
        return held_out
    shares = [each * max_records // total for each in held_out]
    remainders = [each * max_records % total for each in held_out]
    by_remainder = sorted(range(len(held_out)), key=lambda bucket: -remainders[bucket])
    for bucket in by_remainder[: max_records - sum(shares)]:
        shares[bucket] += 1
    return shares


def _draw_0(step: int, bucket: int, shards: Int64s, records: Int64s) -> PlannedBatch:
    positions = np.arange(len(shards))
    return PlannedBatch(0, step, bucket, shards, records, np.zeros_like(records), positions)


def _prefix(image_id: str) -> int:
    return int(image_id[:8], 16)
