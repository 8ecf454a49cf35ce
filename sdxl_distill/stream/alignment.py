"""Alignment: shard i of every set holds the same keys in the same order, or is refused.

Decided from the manifests when the sets are opened. `ShardSet` compares each index with its
manifest when it is first used, so what is aligned here stays aligned while records are read.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Final, Literal, NamedTuple

from sdxl_distill.core.bucket import Bucket
from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.shards.manifest import ShardEntry
from sdxl_distill.shards.set_identity import Kind
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.shard_set import ShardSet
from sdxl_distill.stream.joined_sets import JoinedSets

OnMissing = Literal["error", "intersect"]

_log = logging.getLogger(__name__)

_BUILDERS: Final[Mapping[Kind, str]] = {
    "latents": "accelerate launch tools/build_latents.py --config",
    "text": "accelerate launch tools/build_text.py --config",
    "predictions": "accelerate launch tools/build_shards.py --config",
}


class AlignedShard(NamedTuple):
    """A shard that all sets have; its records have the same keys in every set and draw."""

    bucket: Bucket
    number: int
    num_records: int

    def name(self, shard_set: ShardSet, draw: int) -> ShardName:
        """Return the shard's name in a set; only predictions sets have draws."""
        own_draw = draw if shard_set.manifest.identity.kind == "predictions" else 0
        return ShardName(shard_set.id, *self.bucket, self.number, own_draw)


def align(sets: JoinedSets, on_missing: OnMissing) -> tuple[AlignedShard, ...]:
    """Return the shards that all sets have, sorted by bucket and number.

    Args:
        sets: the joined sets.
        on_missing: `error` refuses a shard that some set lacks, `intersect` leaves it out.

    Raises:
        IncompatibleError: when shards are missing or were made from latents shards that have
            been replaced; gives the counts per set and bucket and the commands to build them.
        CorruptError: when a shard holds other keys than the latents shard it claims to follow.
        ConfigError: when there is no shard that all sets have.
    """
    # Which shards each set lacks.
    numbers = [_places(shard_set) for shard_set in sets.all]
    common, known = set.intersection(*numbers), set.union(*numbers)
    missing = {
        shard_set: _count_buckets(known - own)
        for shard_set, own in zip(sets.all, numbers, strict=True)
        if known > own
    }

    # Refuse that, or leave them out.
    if missing and on_missing == "error":
        raise _missing(missing)
    for shard_set, counts in missing.items():
        _log.warning("left out: %s lacks %s", shard_set.id, _describe(counts))
    if not common:
        raise ConfigError(
            "there is no shard that all sets have",
            where=", ".join(str(shard_set.location) for shard_set in sets.all),
            action="build more shards of each set",
        )

    # What has the same name must hold the same records.
    _require_fresh(sets, common)
    _require_same_keys(sets, common)
    return tuple(
        AlignedShard(Bucket(entry.width, entry.height), entry.number, entry.num_records)
        for entry in sets.latents.manifest.shards
        if entry[:3] in common
    )


def _places(shard_set: ShardSet) -> set[tuple[int, int, int]]:
    return {entry[:3] for entry in shard_set.manifest.shards}


def _count_buckets(places: set[tuple[int, int, int]]) -> Counter[Bucket]:
    return Counter(Bucket(width, height) for width, height, _ in sorted(places))


def _describe(counts: Counter[Bucket]) -> str:
    return ", ".join(
        f"{count} {'shard' if count == 1 else 'shards'} of {bucket}"
        for bucket, count in counts.items()
    )


def _missing(missing: Mapping[ShardSet, Counter[Bucket]]) -> IncompatibleError:
    return IncompatibleError(
        "shards are missing: "
        + "; ".join(f"{each.id} lacks {_describe(counts)}" for each, counts in missing.items()),
        expected="the same shards in every set",
        where=", ".join(str(shard_set.location) for shard_set in missing),
        action=f"build them: {_commands(missing)}; or train on what all sets have with "
        "data.on_missing: intersect",
    )


def _commands(shard_sets: Mapping[ShardSet, object], options: str = "") -> str:
    return " && ".join(
        f"{_BUILDERS[each.manifest.identity.kind]} <the configuration of {each.id}>{options}"
        for each in shard_sets
    )


def _require_fresh(sets: JoinedSets, common: set[tuple[int, int, int]]) -> None:
    """Refuse shards made from a latents shard that has since been replaced."""
    sources = {entry[:3]: entry.tar_sha256 for entry in sets.latents.manifest.shards}
    stale = {
        shard_set: Counter(
            Bucket(entry.width, entry.height)
            for entry in _used_entries(shard_set, sets, common)
            if entry.source_sha256 != sources[entry[:3]]
        )
        for shard_set in sets.all
        if shard_set is not sets.latents
    }
    stale = {shard_set: counts for shard_set, counts in stale.items() if counts}
    if stale:
        raise IncompatibleError(
            "shards are stale, made from other latents than today's: "
            + "; ".join(f"{each.id} has {_describe(counts)}" for each, counts in stale.items()),
            expected=f"shards made from those of set {sets.latents.id}",
            where=", ".join(str(shard_set.location) for shard_set in stale),
            action=f"rebuild these shards: {_commands(stale, ' --repair')}",
        )


def _require_same_keys(sets: JoinedSets, common: set[tuple[int, int, int]]) -> None:
    digests = {entry[:3]: entry.keys_digest for entry in sets.latents.manifest.shards}
    for shard_set in sets.all:
        for entry in _used_entries(shard_set, sets, common):
            if entry.keys_digest != digests[entry[:3]]:
                raise _other_keys(shard_set, sets.latents, entry)


def _used_entries(
    shard_set: ShardSet, sets: JoinedSets, common: set[tuple[int, int, int]]
) -> Iterator[ShardEntry]:
    return (
        entry
        for entry in shard_set.manifest.shards
        if entry.draw < sets.num_draws and entry[:3] in common
    )


def _other_keys(shard_set: ShardSet, latents: ShardSet, entry: ShardEntry) -> CorruptError:
    """Read both indices and name the first key that differs."""
    name = entry.name(shard_set.id)
    own = shard_set.index(name).keys()
    expected = latents.index(entry._replace(draw=0).name(latents.id)).keys()
    record, (found_key, expected_key) = next(
        (record, keys)
        for record, keys in enumerate(zip_longest(own, expected, fillvalue="the shard's end"))
        if keys[0] != keys[1]
    )
    return CorruptError(
        f"record {record} is {found_key}",
        expected=f"{expected_key}, as in set {latents.id}",
        where=f"set {shard_set.id}, shard {name.tar}",
        action=f"rebuild this shard: {_commands({shard_set: entry}, ' --repair')}",
    )
