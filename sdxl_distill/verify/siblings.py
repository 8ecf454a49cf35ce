"""Compares one shard set with another that it is, or will be, joined with.

What a join refuses at the first fault is listed here in full: fields that differ, shards that one
set lacks, stale shards, other keys, other noise or timesteps. Only manifests and indices are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from sdxl_distill.errors import DistillError, IncompatibleError
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import ShardEntry
from sdxl_distill.shards.set_identity import NoiseRecipe, SetIdentity
from sdxl_distill.shards.shard_set import ShardSet
from sdxl_distill.stream.joined_sets import (
    require_distinct_ids,
    require_same_draws,
    require_same_latents,
)
from sdxl_distill.verify.finding import Finding, FindingList

_REBUILD: Final = (
    "verify each against the latents set; run the builder of the stale one with --repair"
)


def compare_sets(shard_set: ShardSet, other: ShardSet) -> list[Finding]:
    """Return each way in which a set does not fit another, of any kind; compares shard by shard.

    Args:
        shard_set: the set that the findings are about.
        other: latents, text or predictions of the same images.
    """
    # What the manifests say about the sets, then their shards.
    findings = FindingList(shard_set.id)
    for check in (
        require_distinct_ids,
        _require_same_sources,
        _require_same_draws,
        _require_same_recipe,
    ):
        with findings.collecting():
            check([shard_set, other])
    for error in _missing_shards(shard_set, other):
        findings.add(error)
    found = findings.all()
    for entry, counterpart in _pairs(shard_set, other):
        found += _compare_shards(shard_set, entry, other, counterpart)
    return found


def _are_predictions(*shard_sets: ShardSet) -> bool:
    return all(each.manifest.identity.kind == "predictions" for each in shard_sets)


def _require_same_sources(shard_sets: list[ShardSet]) -> None:
    """Check that both sets follow the same latents, and name the same text set."""
    shard_set, other = shard_sets
    identity, other_identity = shard_set.manifest.identity, other.manifest.identity
    if "latents" not in (identity.kind, other_identity.kind):
        require_same_latents(shard_set, other, None)
    elif _latents_fingerprint(identity) != _latents_fingerprint(other_identity):
        raise IncompatibleError(
            f"latents {_latents_fingerprint(identity)[:12]}…",
            expected=f"{_latents_fingerprint(other_identity)[:12]}…, those of set {other.id}",
            action="name the latents set that the other set was made from, or rebuild that one",
        )
    for one, two in ((identity, other_identity), (other_identity, identity)):
        if one.text is not None and two.kind == "text" and one.text.fingerprint != two.fingerprint:
            raise IncompatibleError(
                f"set {one.id} was made from text set {one.text.fingerprint[:12]}…",
                expected=f"{two.fingerprint[:12]}…, set {two.id}",
                action="name the text set that it was made from",
            )


def _latents_fingerprint(identity: SetIdentity) -> str:
    return identity.fingerprint if identity.latents is None else identity.latents.fingerprint


def _require_same_draws(shard_sets: list[ShardSet]) -> None:
    shard_set, other = shard_sets
    if _are_predictions(shard_set, other) and shard_set.manifest.draws != other.manifest.draws:
        raise IncompatibleError(
            f"{shard_set.manifest.draws} draws",
            expected=f"{other.manifest.draws}, as set {other.id} has",
            action="build the missing draws: raise cache.draws; the trainer uses what both have",
        )


def _require_same_recipe(shard_sets: list[ShardSet]) -> None:
    shard_set, other = shard_sets
    if _are_predictions(shard_set, other):
        require_same_draws([other, shard_set])


def _missing_shards(shard_set: ShardSet, other: ShardSet) -> Iterator[DistillError]:
    own, foreign = _places(shard_set), _places(other)
    for lacking, has, missing in (
        (shard_set, other, foreign.keys() - own.keys()),
        (other, shard_set, own.keys() - foreign.keys()),
    ):
        if missing:
            width, height, number = min(missing)
            yield IncompatibleError(
                f"set {lacking.id} lacks {len(missing)} shards that set {has.id} has, the first "
                f"is {number} of {width}x{height}",
                expected="the same shards in both",
                action=f"run the builder of set {lacking.id}",
            )


def _places(shard_set: ShardSet) -> Mapping[tuple[int, int, int], ShardEntry]:
    return {entry[:3]: entry for entry in shard_set.manifest.shards if entry.draw == 0}


def _pairs(shard_set: ShardSet, other: ShardSet) -> Iterator[tuple[ShardEntry, ShardEntry]]:
    """Yield the shards that are joined; latents and text have one draw for all draws of others."""
    by_draw = _are_predictions(shard_set, other)
    counterparts = {entry[:4]: entry for entry in other.manifest.shards}
    is_wider = not by_draw and other.manifest.identity.kind == "predictions"
    draws = range(other.manifest.draws) if is_wider else range(1)
    for entry in shard_set.manifest.shards:
        for draw in [entry.draw] if by_draw else draws:
            counterpart = counterparts.get((*entry[:3], draw))
            if counterpart is not None:
                yield entry, counterpart


def _compare_shards(
    shard_set: ShardSet, entry: ShardEntry, other: ShardSet, counterpart: ShardEntry
) -> list[Finding]:
    name, other_name = entry.name(shard_set.id), counterpart.name(other.id)
    findings = FindingList(shard_set.id, name.tar)
    # Source and keys; draws can only be compared where the keys are the same.
    if _latents_sha256(shard_set, entry) != _latents_sha256(other, counterpart):
        findings.add(
            IncompatibleError(
                f"made from another latents shard than {other_name.tar}: one of them is stale",
                expected="one source for both",
                action=_REBUILD,
            )
        )
    if entry.keys_digest != counterpart.keys_digest:
        findings.add(
            IncompatibleError(
                f"its {entry.num_records} keys are not those of {other_name.tar}",
                expected=f"the same {counterpart.num_records} keys in the same order",
                action=_REBUILD,
            )
        )
    elif _are_predictions(shard_set, other) and _recipe(shard_set) == _recipe(other):
        with findings.collecting():
            _compare_draws(shard_set.index(name), other.index(other_name), findings)
    return findings.all()


def _latents_sha256(shard_set: ShardSet, entry: ShardEntry) -> str | None:
    """Return the SHA-256 of the latents shard behind a shard: its own, if it is one."""
    is_latents = shard_set.manifest.identity.kind == "latents"
    return entry.tar_sha256 if is_latents else entry.source_sha256


def _recipe(shard_set: ShardSet) -> NoiseRecipe | None:
    return shard_set.manifest.identity.noise


def _compare_draws(index: ShardIndex, other: ShardIndex, findings: FindingList) -> None:
    """Compare by digest what every teacher must be asked in the same way."""
    for tensor in ("seed", "timestep", "noise"):
        differs = index.tensor_digests(tensor) != other.tensor_digests(tensor)
        for record in differs.nonzero()[0]:
            findings.add(
                IncompatibleError(
                    f"another {tensor} than in {other.name.tar}",
                    expected="the same seed, timestep and noise for every teacher",
                    action="verify both sets alone: the wrong one is reported there",
                ),
                index.key(int(record)),
            )
