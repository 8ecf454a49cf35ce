"""What a manifest says of one shard, and the columns in which it stores many."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from sdxl_distill.errors import CorruptError
from sdxl_distill.limits import MAX_DRAWS, MAX_RECORDS, MAX_SHARD_BYTES, MAX_SHARDS
from sdxl_distill.shards.bounded_json import require_names
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.set_reference import is_sha256
from sdxl_distill.shards.shard_name import ShardName, is_bucket_side

_ID: Final = re.compile(r"[0-9a-f]{32}")


class ShardEntry(NamedTuple):
    """One shard; sorts by bucket, number and draw.

    Attributes:
        width, height, number, draw: what its name is derived from.
        num_records: may be 0.
        tar_bytes, tar_sha256: of the tar.
        index_digest: the index's own digest.
        first_id, last_id: image ids of the first and last record; None without records.
        keys_digest: SHA-256 of all ids; equal in the shards that are joined.
        source_sha256: of the latents shard it was made from; in a latents set the digest of the
            ids that were planned for it, None in shards of earlier versions.
    """

    width: int
    height: int
    number: int
    draw: int
    num_records: int
    tar_bytes: int
    tar_sha256: str
    index_digest: str
    first_id: str | None
    last_id: str | None
    keys_digest: str
    source_sha256: str | None

    @classmethod
    def of(cls, index: ShardIndex) -> ShardEntry:
        """Return the entry of a shard with that index."""
        name, num_records = index.name, index.num_records
        return cls(
            width=name.width,
            height=name.height,
            number=name.number,
            draw=name.draw,
            num_records=num_records,
            tar_bytes=index.tar_bytes,
            tar_sha256=index.tar_sha256,
            index_digest=index.digest,
            first_id=index.image_id(0) if num_records else None,
            last_id=index.image_id(num_records - 1) if num_records else None,
            keys_digest=index.keys_digest,
            source_sha256=index.header.source_sha256,
        )

    def name(self, set_id: str) -> ShardName:
        """Return the shard's name in the set called `set_id`."""
        return ShardName(set_id, self.width, self.height, self.number, self.draw)


def num_draws(entries: Sequence[ShardEntry]) -> int:
    """Return how many draws sorted entries hold; 1 when there is none."""
    return entries[-1].draw + 1 if entries else 1


def check_entries(entries: Sequence[ShardEntry], where: str) -> None:
    """Check that entries are sorted, none is twice, and all shards have the same draws.

    Raises:
        CorruptError: naming the first shard that is out of place.
    """
    draws = num_draws(entries)
    for row, entry in enumerate(entries):
        first = entries[row - row % draws]
        if (
            entry.draw != row % draws
            or (entry[:3], entry.keys_digest) != (first[:3], first.keys_digest)
            or (row >= draws and entries[row - draws][:3] >= first[:3])
        ):
            raise CorruptError(
                f"shard {_spell(entry)} is twice, unsorted, or holds other keys than its draw 0",
                expected=f"each shard once in each of {draws} draws, with the same keys",
                where=where,
            )
    if len(entries) % draws:
        raise CorruptError("the last shard lacks a draw", expected=f"{draws} draws", where=where)


def entries_to_columns(entries: Sequence[ShardEntry]) -> dict[str, list[Any]]:
    """Return field → its values in all entries: a third of the size of rows."""
    columns = [list(column) for column in zip(*entries, strict=True)] if entries else []
    return dict(zip(ShardEntry._fields, columns or [[] for _ in ShardEntry._fields], strict=True))


def entries_from_columns(value: Any, where: str) -> tuple[ShardEntry, ...]:
    """Read the columns of a manifest that may come from a stranger; every value is bounded.

    Raises:
        CorruptError: for columns that are missing, unknown or of unequal length, values that no
            shard can have. Order and draws are for `check_entries`.
    """
    fields = require_names(value, set(ShardEntry._fields), where)
    columns: list[list[Any]] = [fields[name] for name in ShardEntry._fields]
    if not all(type(column) is list and len(column) == len(columns[0]) for column in columns):
        raise CorruptError("columns of unequal length", where=where)
    for name, column in zip(ShardEntry._fields, columns, strict=True):
        if not all(map(_IS_LEGAL[name], column)):
            raise CorruptError(f"an absurd value in column {name}", where=where)
    entries = tuple(map(ShardEntry._make, zip(*columns, strict=True)))
    for entry in entries:
        if not _has_consistent_ids(entry):
            raise CorruptError(f"shard {_spell(entry)} has absurd first and last ids", where=where)
    return entries


def _is_between(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _is_side(value: Any) -> bool:
    return type(value) is int and is_bucket_side(value)


def _is_id_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and _ID.fullmatch(value) is not None)


def _is_sha256_or_none(value: Any) -> bool:
    return value is None or is_sha256(value)


_IS_LEGAL: Final[dict[str, Callable[[Any], bool]]] = {
    "width": _is_side,
    "height": _is_side,
    "number": _is_between(0, MAX_SHARDS - 1),
    "draw": _is_between(0, MAX_DRAWS - 1),
    "num_records": _is_between(0, MAX_RECORDS),
    "tar_bytes": _is_between(1, MAX_SHARD_BYTES),
    "tar_sha256": is_sha256,
    "index_digest": is_sha256,
    "first_id": _is_id_or_none,
    "last_id": _is_id_or_none,
    "keys_digest": is_sha256,
    "source_sha256": _is_sha256_or_none,
}


def _has_consistent_ids(entry: ShardEntry) -> bool:
    first, last = entry.first_id, entry.last_id
    if first is None or last is None:
        return first is last and entry.num_records == 0
    return first < last if entry.num_records > 1 else first == last and entry.num_records == 1


def _spell(entry: ShardEntry) -> str:
    return f"{entry.number} of {entry.width}x{entry.height}, draw {entry.draw}"
