"""`manifest.json`: the JSON that describes a complete shard set, a function of its inputs alone.

From set identity, catalog number and indices any finisher writes the same bytes. Readers start from
it; it may come from a stranger, so names are derived from numbers and everything is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, NamedTuple, cast

from sdxl_distill.core.image_id import parse_record_key
from sdxl_distill.errors import ConfigError, CorruptError
from sdxl_distill.fingerprint import fingerprint
from sdxl_distill.limits import (
    MAX_DRAWS,
    MAX_MANIFEST_BYTES,
    MAX_RECORDS,
    MAX_SHARD_BYTES,
    MAX_SHARDS,
    MAX_SIDE_PX,
)
from sdxl_distill.shards.bounded_json import Legal, require_names, seal, unseal
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.set_identity import FIELDS, SetIdentity, is_counter, is_sha256
from sdxl_distill.shards.shard_name import ShardName, is_bucket_side

_ID: Final = re.compile(r"[0-9a-f]{32}")


class ShardEntry(NamedTuple):
    """One shard; sorts by bucket, number and draw.

    Attributes:
        width: the bucket's width in pixels.
        height: the bucket's height in pixels.
        number: the shard's number in its bucket.
        draw: the shard's draw.
        num_records: the number of its records; may be 0.
        tar_bytes: the size of the tar.
        tar_sha256: the SHA-256 of the tar, 64 hex digits.
        index_digest: the index's own digest, 64 hex digits.
        first_id: the image id of the first record; None without records.
        last_id: the image id of the last record; None without records.
        keys_digest: the SHA-256 of all ids; equal in the shards that are joined.
        source_sha256: the digest of the latents shard it was made from; in a latents set that of
            the ids that were planned for it, None in shards of earlier versions.
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
    """Check that entries are sorted and distinct, and that all shards have the same draws.

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
                f"shard {_describe(entry)} is listed twice, out of order, or holds other keys "
                "than its draw 0",
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
        raise CorruptError(
            "shards has columns of unequal length", expected="one value of each shard", where=where
        )
    for name, column in zip(ShardEntry._fields, columns, strict=True):
        is_legal, expected = _LEGAL_COLUMNS[name]
        if not all(map(is_legal, column)):
            row = next(row for row, value in enumerate(column) if not is_legal(value))
            raise CorruptError(
                f"shards.{name}[{row}] has an illegal value", expected=expected, where=where
            )
    entries = tuple(map(ShardEntry._make, zip(*columns, strict=True)))
    for entry in entries:
        if not _has_consistent_ids(entry):
            raise CorruptError(
                f"the first and last ids of shard {_describe(entry)} are "
                f"{entry.first_id} and {entry.last_id}",
                expected=f"those of {entry.num_records} records in ascending order",
                where=where,
            )
    return entries


def _number(least: int, most: int) -> tuple[Callable[[Any], bool], str]:
    def is_legal(value: Any) -> bool:
        return type(value) is int and least <= value <= most

    return is_legal, f"a whole number from {least} to {most}"


def _is_side(value: Any) -> bool:
    return type(value) is int and is_bucket_side(value)


def _is_id_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and _ID.fullmatch(value) is not None)


def _is_sha256_or_none(value: Any) -> bool:
    return value is None or is_sha256(value)


_DIGEST: Final = (is_sha256, "64 hex digits")
_SIDE: Final = (_is_side, f"a multiple of 8 up to {MAX_SIDE_PX}")
_ID_OR_NULL: Final = (_is_id_or_none, "32 hex digits, or null")
_LEGAL_COLUMNS: Final[Legal] = {
    "width": _SIDE,
    "height": _SIDE,
    "number": _number(0, MAX_SHARDS - 1),
    "draw": _number(0, MAX_DRAWS - 1),
    "num_records": _number(0, MAX_RECORDS),
    "tar_bytes": _number(1, MAX_SHARD_BYTES),
    "tar_sha256": _DIGEST,
    "index_digest": _DIGEST,
    "first_id": _ID_OR_NULL,
    "last_id": _ID_OR_NULL,
    "keys_digest": _DIGEST,
    "source_sha256": (_is_sha256_or_none, "64 hex digits, or null"),
}


def _has_consistent_ids(entry: ShardEntry) -> bool:
    first, last = entry.first_id, entry.last_id
    if first is None or last is None:
        return first is last and entry.num_records == 0
    return first < last if entry.num_records > 1 else first == last and entry.num_records == 1


def _describe(entry: ShardEntry) -> str:
    return f"{entry.number} of {entry.width}x{entry.height}, draw {entry.draw}"


MANIFEST_NAME: Final = "manifest.json"
_MANIFEST_FIELDS: Final = frozenset({"catalog", "draws", "empty_sha256", "shards", "undecodable"})


@dataclass(frozen=True)
class Manifest:
    """All that is known of a complete set before a shard is opened.

    Attributes:
        identity: the set identity, repeated in the manifest.
        catalog: the number n of the catalog whose images the set holds.
        shards: the entries of all shards, sorted by bucket, number and draw.
        undecodable: the keys of the catalog's images that did not decode (latents sets), sorted.
        empty_sha256: the digest of `empty.safetensors`, the empty caption's record (text sets).
    """

    identity: SetIdentity
    catalog: int
    shards: tuple[ShardEntry, ...]
    undecodable: tuple[str, ...] = ()
    empty_sha256: str | None = None

    @classmethod
    def build(
        cls,
        identity: SetIdentity,
        catalog: int,
        indices: Iterable[ShardIndex],
        undecodable: Iterable[str] = (),
        empty_sha256: str | None = None,
    ) -> Manifest:
        """Describe a set whose shards have these indices, in any order.

        Raises:
            CorruptError: when a shard is there twice or belongs to another set, or the draws of
                one shard do not hold the same keys.
        """
        shards: list[ShardEntry] = []
        for index in indices:
            if index.header.fingerprint != identity.fingerprint:
                raise CorruptError(
                    f"an index of set {index.header.fingerprint[:12]}…",
                    expected=f"{identity.fingerprint[:12]}…",
                    where=f"set {identity.id}, {index.name.idx}",
                    action="rebuild this shard: run its builder with --repair",
                )
            shards.append(ShardEntry.of(index))
        manifest = cls(
            identity,
            catalog,
            tuple(sorted(shards, key=lambda entry: entry[:4])),
            tuple(sorted(undecodable)),
            empty_sha256,
        )
        manifest._check(f"set {identity.id}")
        return manifest

    @property
    def draws(self) -> int:
        """How many draws of each image the set holds; 1 also for an empty set."""
        return num_draws(self.shards)

    @property
    def num_records(self) -> int:
        """How many records all shards of all draws hold."""
        return sum(entry.num_records for entry in self.shards)

    @cached_property
    def digest(self) -> str:
        """The manifest's own digest: SHA-256 of the canonical JSON of its other fields."""
        return fingerprint(self._fields())

    def names(self) -> list[ShardName]:
        """Return the names of all shards, in order."""
        return [entry.name(self.identity.id) for entry in self.shards]

    def entry(self, name: ShardName) -> ShardEntry:
        """Return what is known of a shard; KeyError when the set has none of that name."""
        return self._rows[name]

    @cached_property
    def _rows(self) -> dict[ShardName, ShardEntry]:
        return dict(zip(self.names(), self.shards, strict=True))

    def _fields(self) -> dict[str, Any]:
        return {
            **self.identity.to_json(),
            "catalog": self.catalog,
            "draws": self.draws,
            "empty_sha256": self.empty_sha256,
            "shards": entries_to_columns(self.shards),
            "undecodable": list(self.undecodable),
        }

    def to_bytes(self) -> bytes:
        """Return the content of `manifest.json`.

        Raises:
            ConfigError: when it is larger than a reader accepts.
        """
        content = seal(self._fields())
        if len(content) > MAX_MANIFEST_BYTES:
            raise ConfigError(
                f"a manifest of {len(content):,} bytes: {len(self.shards):,} shards, "
                f"{len(self.undecodable):,} images that did not decode",
                expected=f"at most {MAX_MANIFEST_BYTES:,} bytes",
                where=f"set {self.identity.id}",
                action="remove images that do not decode from data.image_dir, or raise "
                "data.records_per_shard, and build the latents again",
            )
        return content

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Manifest:
        """Read the content of `manifest.json`.

        Raises:
            CorruptError: when it is larger than 512 MiB, or not byte for byte what `to_bytes`
                writes for what it says, or contradicts itself.
            IncompatibleError: when a newer version wrote it.
        """
        fields = require_names(
            unseal(content, where, MAX_MANIFEST_BYTES), {*FIELDS, *_MANIFEST_FIELDS}, where
        )
        if not is_counter(fields["catalog"]):
            raise CorruptError(
                "catalog has an illegal value", expected="a whole number from 0 to 2⁵³", where=where
            )
        manifest = cls(
            identity=SetIdentity.from_json({name: fields[name] for name in FIELDS}, where),
            catalog=fields["catalog"],
            shards=entries_from_columns(fields["shards"], where),
            undecodable=_parse_keys(fields["undecodable"], where),
            empty_sha256=fields["empty_sha256"],
        )
        manifest._check(where)
        if fields["draws"] != manifest.draws:
            raise CorruptError(
                "draws has a wrong value",
                expected=f"{manifest.draws}, as many as the shards have",
                where=where,
            )
        return manifest

    def _check(self, where: str) -> None:
        # What only sets of one kind have.
        kind = self.identity.kind
        is_legal = is_sha256(self.empty_sha256) if kind == "text" else self.empty_sha256 is None
        if not is_legal:
            raise CorruptError(
                "empty_sha256 has an illegal value",
                expected="64 hex digits" if kind == "text" else f"null in a {kind} set",
                where=where,
            )
        if self.undecodable and kind != "latents":
            raise CorruptError(
                f"undecodable names {len(self.undecodable)} images",
                expected=f"none in a {kind} set",
                where=where,
            )
        if self.draws > 1 and kind != "predictions":
            raise CorruptError(
                f"{self.draws} draws, which a {kind} set does not have", expected="1", where=where
            )
        # Keys and shards.
        for key in self.undecodable:
            parse_record_key(key)
        if any(before >= after for before, after in pairwise(self.undecodable)):
            raise CorruptError("undecodable is out of order, or names a key twice", where=where)
        if kind != "latents" and any(entry.source_sha256 is None for entry in self.shards):
            raise CorruptError(
                "a shard's source_sha256 is null",
                expected=f"64 hex digits in a {kind} set",
                where=where,
            )
        check_entries(self.shards, where)


def _parse_keys(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise CorruptError("undecodable is not a list", expected="a list of keys", where=where)
    keys = cast("list[Any]", value)
    if not all(isinstance(key, str) for key in keys):
        row = next(row for row, key in enumerate(keys) if not isinstance(key, str))
        raise CorruptError(f"undecodable[{row}] is not text", expected="a key", where=where)
    return tuple(keys)
