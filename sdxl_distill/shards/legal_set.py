"""Refuses a set that no reader would accept, while it is only planned: see limits.py.

In: the record schema and how many records each shard will hold. Out: nothing, or the key to
change and the value that works.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from sdxl_distill.errors import ConfigError, CorruptError
from sdxl_distill.limits import MAX_RECORDS, MAX_SHARD_BYTES, MAX_SHARDS
from sdxl_distill.shards.index import tar_layout
from sdxl_distill.shards.record import RecordHeader, RecordSchema
from sdxl_distill.shards.tar import BLOCK_BYTES, closed_bytes, padded

_SHA256 = "0" * 64


class ShardLoad(NamedTuple):
    """What one shard will hold.

    Attributes:
        width: the bucket's width in pixels.
        height: the bucket's height in pixels.
        num_records: the largest number of its records.
        sidecar_sizes: the size of each record's sidecar in bytes; empty where there are none.
    """

    width: int
    height: int
    num_records: int
    sidecar_sizes: tuple[int, ...] = ()


class Remedy(NamedTuple):
    """What a user changes when a shard is too large or there are too many.

    Attributes:
        key: the configuration key, or the option, for the number of records in a shard.
        besides: the rest of the sentence: a further step that a new value requires.
        if_large: the end of the sentence: another way to smaller shards.
        if_many: the end of the sentence: another way to fewer shards.
        most: the largest number of records in a shard that the other sets allow.
    """

    key: str = "data.records_per_shard"
    besides: str = ""
    if_large: str = ""
    if_many: str = ""
    most: int = MAX_RECORDS


def most_records(record_bytes: int, sidecar_bytes: int = 0) -> int:
    """Return how many records of one size a legal shard can hold, at most 65,536.

    Args:
        record_bytes: the size of each record, header included.
        sidecar_bytes: the size of each sidecar; 0 where there are none.
    """
    room = BLOCK_BYTES + padded(record_bytes)
    if sidecar_bytes:
        room += BLOCK_BYTES + padded(sidecar_bytes)
    most = min(MAX_RECORDS, MAX_SHARD_BYTES // room)
    while most and closed_bytes(most * room) > MAX_SHARD_BYTES:
        most -= 1
    return most


def most_records_in(schema: RecordSchema, loads: Iterable[ShardLoad]) -> int:
    """Return how many records of a set a legal shard can hold, whichever load it has.

    Raises:
        ConfigError: when a record of one of the buckets is too large by itself.
    """
    return min(
        most_records(_record_bytes("planned", schema, load), max(load.sidecar_sizes, default=0))
        for load in loads
    )


def require_legal_shards(
    set_id: str,
    schema: RecordSchema,
    shards: Iterable[ShardLoad],
    remedy: Remedy,
    *,
    draws: int = 1,
) -> None:
    """Refuse shards with more bytes or records than a reader accepts, and too many shards.

    Args:
        set_id: the set's name, for the message.
        schema: the schema of its records.
        shards: the load of every shard of one draw.
        remedy: the change that the message suggests.
        draws: the number of draws of each shard.

    Raises:
        ConfigError: naming the key and the value that works.
    """
    # Count, and find the largest shard and the most records that would be legal.
    num_shards = num_records = 0
    looked_at: set[ShardLoad] = set()
    most, largest = remedy.most, ("", 0, 0)
    for load in shards:
        num_shards += draws
        num_records += draws * load.num_records
        if load in looked_at:
            continue
        if not load.sidecar_sizes:
            looked_at.add(load)
        record_bytes = _record_bytes(set_id, schema, load)
        most = min(most, most_records(record_bytes, max(load.sidecar_sizes, default=0)))
        sizes = np.array(load.sidecar_sizes or [0] * load.num_records, np.int64)
        tar_bytes = tar_layout(record_bytes, sizes)[1]
        if load.num_records > MAX_RECORDS or tar_bytes > max(MAX_SHARD_BYTES, largest[1]):
            largest = f"{load.width}x{load.height}", tar_bytes, load.num_records
    # Refuse with the value that works.
    if largest[0]:
        bucket, tar_bytes, count = largest
        raise ConfigError(
            f"shards of set {set_id} with {count:,} records at {bucket} would have "
            f"{tar_bytes:,} bytes",
            expected=f"at most {MAX_SHARD_BYTES:,} bytes and {MAX_RECORDS:,} records",
            where=remedy.key,
            action=f"set {remedy.key} to at most {most}{remedy.besides}{remedy.if_large}",
        )
    if num_shards > MAX_SHARDS:
        raise ConfigError(
            f"set {set_id} would have {num_shards:,} shards, all draws together",
            expected=f"at most {MAX_SHARDS:,}",
            where=remedy.key,
            action=f"set {remedy.key} to {_enough(num_records, most)}{remedy.besides}"
            f"{remedy.if_many}",
        )


def _record_bytes(set_id: str, schema: RecordSchema, load: ShardLoad) -> int:
    try:
        header = RecordHeader.build(schema, load.width, load.height, _SHA256, _SHA256)
    except CorruptError as error:
        raise ConfigError(
            f"set {set_id} would have {error.found}",
            expected=error.expected,
            where=f"bucket {load.width}x{load.height}",
            action="leave this bucket out, or check the checkpoint",
        ) from error
    return header.record_bytes


def _enough(num_records: int, most: int) -> str:
    """Spell out how many records a shard needs; a tenth more, as buckets end in short shards."""
    least = -(-num_records * 11 // (10 * MAX_SHARDS))
    if least > most:
        return f"{most}, and divide the images between several sets"
    return f"at least {least} and at most {most}"
