"""Bytes that a shard set takes on disk, exactly, from its record schema and record counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from sdxl_distill.shards.index import ShardIndex, tar_layout
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.record import RecordHeader, RecordSchema
from sdxl_distill.shards.shard_name import ShardName

_SHA256: Final = "0" * 64


@dataclass(frozen=True)
class SetSize:
    """Shards, records and bytes of one set: tars and indices, without the manifest."""

    num_shards: int
    num_records: int
    num_bytes: int


def planned_size(
    schema: RecordSchema,
    shards: Iterable[tuple[int, int, int]],
    *,
    sidecar_bytes: int = 0,
) -> SetSize:
    """Return the size of a set that is not there yet.

    Args:
        schema: the schema of its records.
        shards: width, height and number of records of each shard.
        sidecar_bytes: the size of each record's `{key}.json`; 0 if there is none.
    """
    counts = Counter(shards)
    num_bytes = 0
    for (width, height, num_records), count in counts.items():
        header = RecordHeader.build(schema, width, height, _SHA256, _SHA256)
        _, tar_bytes = tar_layout(
            header.record_bytes, np.full(num_records, sidecar_bytes, np.int64)
        )
        num_bytes += count * (tar_bytes + _index_bytes(header, width, height, num_records))
    num_records = sum(shard[2] * count for shard, count in counts.items())
    return SetSize(counts.total(), num_records, num_bytes)


def present_size(manifest: Manifest) -> SetSize:
    """Return the size of a set that is there."""
    schema = manifest.identity.schema
    num_bytes = 0
    for entry in manifest.shards:
        header = RecordHeader.build(schema, entry.width, entry.height, _SHA256, entry.source_sha256)
        num_bytes += entry.tar_bytes
        num_bytes += _index_bytes(header, entry.width, entry.height, entry.num_records)
    return SetSize(len(manifest.shards), manifest.num_records, num_bytes)


def _index_bytes(header: RecordHeader, width: int, height: int, num_records: int) -> int:
    """Return the size of an index by making one; which numbers it holds does not matter."""
    zeros = np.zeros(num_records, np.int64)
    digests = np.zeros((num_records, len(header.places)), np.uint64)
    index = ShardIndex(
        name=ShardName("set", width, height, 0),
        header=header,
        ids=np.zeros((num_records, 16), np.uint8),
        offsets=zeros,
        sizes=zeros,
        sidecar_sizes=zeros,
        digests=digests,
        rest_digests=zeros.astype(np.uint64),
        noise_digests=zeros.astype(np.uint64) if header.recreates_noise else None,
        tar_bytes=tar_layout(header.record_bytes, zeros)[1],
        tar_sha256=_SHA256,
    )
    return len(index.to_bytes())
