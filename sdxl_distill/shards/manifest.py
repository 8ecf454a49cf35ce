"""`manifest.json`: the JSON that describes a complete shard set, a function of its inputs alone.

From set record, catalog number and indices any finisher writes the same bytes. Readers start from
it; it may come from a stranger, so names are derived from numbers and everything is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, cast

from sdxl_distill.core.image_id import parse_record_key
from sdxl_distill.errors import ConfigError, CorruptError
from sdxl_distill.fingerprint import fingerprint
from sdxl_distill.limits import MAX_MANIFEST_BYTES
from sdxl_distill.shards.bounded_json import require_names
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.sealed_json import seal, unseal
from sdxl_distill.shards.set_record import FIELDS, SetRecord, is_counter
from sdxl_distill.shards.set_reference import is_sha256
from sdxl_distill.shards.shard_entry import (
    ShardEntry,
    check_entries,
    entries_from_columns,
    entries_to_columns,
    num_draws,
)
from sdxl_distill.shards.shard_name import ShardName

MANIFEST_NAME: Final = "manifest.json"
_MANIFEST_FIELDS: Final = frozenset({"catalog", "draws", "empty_sha256", "shards", "undecodable"})


@dataclass(frozen=True)
class Manifest:
    """All that is known of a complete set before a shard is opened.

    Attributes:
        record: the set record, repeated in the manifest.
        catalog: number n of the catalog whose images the set holds.
        shards: sorted by bucket, number and draw.
        undecodable: keys of the catalog's images that did not decode (latents sets), sorted.
        empty_sha256: of `empty.safetensors`, the empty caption's record (text sets).
    """

    record: SetRecord
    catalog: int
    shards: tuple[ShardEntry, ...]
    undecodable: tuple[str, ...] = ()
    empty_sha256: str | None = None

    @classmethod
    def build(
        cls,
        record: SetRecord,
        catalog: int,
        indices: Iterable[ShardIndex],
        undecodable: Iterable[str] = (),
        empty_sha256: str | None = None,
    ) -> Manifest:
        """Describe a set whose shards have these indices, in any order.

        Raises:
            CorruptError: when a shard is twice or belongs to another set, or the draws of one
                shard do not hold the same keys.
        """
        shards: list[ShardEntry] = []
        for index in indices:
            if index.header.fingerprint != record.fingerprint:
                raise CorruptError(
                    f"an index of set {index.header.fingerprint[:12]}…",
                    expected=f"{record.fingerprint[:12]}…",
                    where=f"set {record.id}, {index.name.idx}",
                    action="rebuild this shard: run its builder with --repair",
                )
            shards.append(ShardEntry.of(index))
        manifest = cls(
            record,
            catalog,
            tuple(sorted(shards, key=lambda entry: entry[:4])),
            tuple(sorted(undecodable)),
            empty_sha256,
        )
        manifest._check(f"set {record.id}")
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
        return [entry.name(self.record.id) for entry in self.shards]

    def entry(self, name: ShardName) -> ShardEntry:
        """Return what is known of a shard; KeyError when the set has none of that name."""
        return self._rows[name]

    @cached_property
    def _rows(self) -> dict[ShardName, ShardEntry]:
        return dict(zip(self.names(), self.shards, strict=True))

    def _fields(self) -> dict[str, Any]:
        return {
            **self.record.to_json(),
            "catalog": self.catalog,
            "draws": self.draws,
            "empty_sha256": self.empty_sha256,
            "shards": entries_to_columns(self.shards),
            "undecodable": list(self.undecodable),
        }

    def to_bytes(self) -> bytes:
        """Return the content of `manifest.json`.

        Raises:
            ConfigError: when it is larger than a reader takes.
        """
        content = seal(self._fields())
        if len(content) > MAX_MANIFEST_BYTES:
            raise ConfigError(
                f"a manifest of {len(content):,} bytes: {len(self.shards):,} shards, "
                f"{len(self.undecodable):,} images that did not decode",
                expected=f"at most {MAX_MANIFEST_BYTES:,} bytes",
                where=f"set {self.record.id}",
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
            raise CorruptError("an absurd catalog number", where=where)
        manifest = cls(
            record=SetRecord.from_json({name: fields[name] for name in FIELDS}, where),
            catalog=fields["catalog"],
            shards=entries_from_columns(fields["shards"], where),
            undecodable=_parse_keys(fields["undecodable"], where),
            empty_sha256=fields["empty_sha256"],
        )
        manifest._check(where)
        if fields["draws"] != manifest.draws:
            raise CorruptError("a wrong number of draws", expected=f"{manifest.draws}", where=where)
        return manifest

    def _check(self, where: str) -> None:
        kind = self.record.kind
        if (
            (self.empty_sha256 is not None) != (kind == "text")
            or (self.undecodable and kind != "latents")
            or (self.draws > 1 and kind != "predictions")
        ):
            raise CorruptError(f"fields that a {kind} set does not have, or lacks", where=where)
        if self.empty_sha256 is not None and not is_sha256(self.empty_sha256):
            raise CorruptError("an absurd empty_sha256", where=where)
        for key in self.undecodable:
            parse_record_key(key)
        if any(before >= after for before, after in pairwise(self.undecodable)):
            raise CorruptError("undecodable is unsorted, or names a key twice", where=where)
        if kind != "latents" and any(entry.source_sha256 is None for entry in self.shards):
            raise CorruptError("source_sha256 is missing", where=where)
        check_entries(self.shards, where)


def _parse_keys(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise CorruptError("undecodable is no list", where=where)
    keys = cast("list[Any]", value)
    if not all(isinstance(key, str) for key in keys):
        raise CorruptError("undecodable holds something else than keys", where=where)
    return tuple(keys)
