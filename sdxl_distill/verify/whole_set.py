"""Verifies one shard set alone, without a GPU: complete, undamaged, with the values it must hold.

Set identity, manifest and every shard are checked as far as damage elsewhere allows, and findings
are collected. A set that is still being built is checked too, and reported as incomplete.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sdxl_distill.runtime.ordered_map import ordered_map
from sdxl_distill.shards.manifest import ShardEntry
from sdxl_distill.shards.set_folder import SetFolder
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.storage.location import Location
from sdxl_distill.verify.catalog_check import NO_CATALOG, check_catalog, is_without_catalog
from sdxl_distill.verify.finding import Finding, exit_code_of
from sdxl_distill.verify.id_check import IdCheck
from sdxl_distill.verify.set_check import (
    check_empty_record,
    check_identity,
    check_recipe,
    check_strangers,
    incomplete,
    read_identity,
    read_manifest,
)
from sdxl_distill.verify.shard_check import CheckedShard, check_shard, existing_index

Progress = Callable[[int, int], None]
"""Called with how many shards (or files) are done, and how many there are."""


@dataclass
class Verification:
    """What a verification found.

    Attributes:
        set_id: the set's name; the folder's where it cannot be read.
        kind: latents, text or predictions; None where it cannot be read.
        num_records: the number of records in all shards and draws.
        num_shards: the number of shards in all draws; 0 for loose files.
        num_draws: the number of draws of each image.
        num_bytes: the size of all tars, or of all loose files.
        findings: the faults; empty for a set that is complete and valid.
        notes: other news for the user: checks that were not possible, records that were drawn.
    """

    set_id: str
    kind: str | None = None
    num_records: int = 0
    num_shards: int = 0
    num_draws: int = 1
    num_bytes: int = 0
    findings: list[Finding] = field(default_factory=list[Finding])
    notes: list[str] = field(default_factory=list[str])

    @property
    def exit_code(self) -> int:
        """Exit code of the worst finding; 0 when there is none."""
        return exit_code_of(self.findings)


def show_nothing(num_done: int, num_all: int) -> None:
    """Do nothing: the `Progress` for callers that want none."""
    del num_done, num_all


def verify_set(
    path: str | Path | Location,
    *,
    quick: bool = False,
    num_threads: int = 1,
    on_progress: Progress = show_nothing,
) -> Verification:
    """Verify a shard set.

    Args:
        path: the folder of the set.
        quick: True to read only set identity, manifest and indices, and to compare the sizes of
            the tars, which stay closed.
        num_threads: the number of shards that are read at once.
        on_progress: a function that is called after each shard.

    Raises:
        ConfigError: when there is no such folder.
        StorageError: when it cannot be listed.
    """
    location = Location(path)
    with location.open() as directory:
        # What describes the set, and so which shards there should be.
        names, folder = directory.names(), SetFolder(directory)
        identity, findings = read_identity(folder)
        manifest, more = read_manifest(folder)
        result = Verification(location.real().name, findings=findings + more)
        if manifest is not None:
            result.findings += check_identity(identity or manifest.identity, manifest)
            identity = manifest.identity
            entries = dict(zip(manifest.names(), manifest.shards, strict=True))
        elif identity is not None:
            committed, finding = incomplete(identity, names)
            result.findings += [] if more else [finding]
            entries = dict.fromkeys(committed)
        else:
            return result
        result.set_id, result.kind = identity.id, identity.kind
        result.findings += check_strangers(identity, names, entries, complete=manifest is not None)
        if identity.kind == "text":
            result.findings += check_empty_record(folder, identity, manifest)
        # Every shard, then all ids together.
        unknown_noise = check_recipe(identity)
        result.findings += unknown_noise
        check = partial(check_shard, folder, identity, quick=quick or bool(unknown_noise))
        ids = IdCheck(identity, () if manifest is None else manifest.undecodable)
        _check_all(result, ids, check, entries, num_threads, on_progress)
        result.findings += ids.findings(partial(existing_index, folder, identity))
        # The catalog that the shards follow.
        if identity.kind == "latents":
            if is_without_catalog(location, manifest):
                result.notes.append(NO_CATALOG)
            else:
                result.findings += check_catalog(location, identity, manifest, entries, quick=quick)
    return result


def _check_all(
    result: Verification,
    ids: IdCheck,
    check: Callable[[ShardName, ShardEntry | None], CheckedShard],
    entries: Mapping[ShardName, ShardEntry | None],
    num_threads: int,
    on_progress: Progress,
) -> None:
    """Check every shard and add it to the result; keep only what the check of all ids needs."""

    def check_one(pair: tuple[ShardName, ShardEntry | None]) -> CheckedShard:
        return check(*pair)

    for shard in ordered_map(check_one, entries.items(), num_threads, "verify"):
        result.findings += shard.findings
        result.num_shards += 1
        result.num_draws = max(result.num_draws, 1 + shard.name.draw)
        if shard.index is not None:
            result.num_records += shard.index.num_records
            result.num_bytes += shard.index.tar_bytes
            ids.add(shard.index)
        on_progress(result.num_shards, len(entries))
