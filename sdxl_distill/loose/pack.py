"""Packs a loose folder into a shard set: the tars, indices and manifest that a builder writes.

Which record belongs in which shard is read off the latents set, so shard i holds the same keys
in every set. All names and headers are checked before the first byte is written.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Final, NamedTuple

from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.limits import MAX_HEADER_BYTES, MAX_SIDECAR_BYTES
from sdxl_distill.loose.folder import LooseFolder, LooseRecord, open_new_folder
from sdxl_distill.loose.segments import (
    LooseCatalog,
    copy_catalog,
    has_catalog,
    read_loose_catalog,
)
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.legal_set import Remedy, ShardLoad, require_legal_shards
from sdxl_distill.shards.manifest import MANIFEST_NAME, Manifest
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.set_folder import EMPTY_RECORD_NAME, SetFolder
from sdxl_distill.shards.set_identity import SET_IDENTITY_NAME, SetIdentity, SetReference
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.shard_set import ShardSet, open_shard_set
from sdxl_distill.shards.tar import read_at
from sdxl_distill.shards.tar_index import recreated_noise_digest
from sdxl_distill.shards.writer import ShardWriter
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.location import Location

Progress = Callable[[int, int], None]

_RECORDS_PER_SHARD: Final = 512
_UNPACK_AGAIN: Final = "unpack the set again, or remove what does not belong to it"


class _Plan(NamedTuple):
    """One shard: its name, the header that its records share, and the records in order."""

    name: ShardName
    header: RecordHeader
    records: list[LooseRecord]


def pack_set(
    path: str | Path | Location,
    output: str | Path | Location,
    latents_path: str | Path | Location | None = None,
    *,
    records_per_shard: int | None = None,
    on_progress: Progress = lambda _done, _all: None,
) -> Manifest:
    """Write the shard set that a loose folder holds, and return its manifest.

    Tars are byte for byte those that the folder was unpacked from.

    Args:
        path: a folder that `unpack_set` wrote; it is only read.
        output: a new or empty folder.
        latents_path: the latents set that the records follow. None for latents themselves, which
            follow the folder's catalog; without one, sorted keys are cut and the set cannot grow.
        records_per_shard: the size of shards cut without a catalog; None takes that of `set.json`.
        on_progress: called with the number of shards that are done and the number of all.

    Raises:
        ConfigError: when `set.json` or the latents set is missing, some files are not records,
            the output folder is not empty, or no reader would accept the shards.
        IncompatibleError: when records are missing, too many, or from other sets or latents.
        CorruptError: when a file is damaged.
        StorageError: when the disk is full or refuses.
    """
    location, target_location = Location(path), Location(output)
    with location.open() as source:
        # Find out which set this is, and which record belongs in which shard.
        identity = _read_identity(source)
        folder, before, origin = LooseFolder.of(source.names()), None, None
        _require_no_strangers(folder, identity, source)
        latents = None if latents_path is None else open_shard_set(latents_path)
        if latents is not None:
            before, origin = latents.manifest, latents.location
            identity = _follow(identity, latents, target_location)
            plans = _plan_after(latents, identity, folder)
        elif identity.kind == "latents" and has_catalog(location):
            loose, origin = read_loose_catalog(location, identity), location
            before, plans = loose.manifest, _plan_by_catalog(loose, identity)
        else:
            plans = _plan_by_cutting(identity, folder, records_per_shard, source)
        # Everything that can be refused is refused before the first byte is written.
        if before is not None:
            _require_same_records(folder, plans, source)
        _require_headers(source, plans)
        _require_legal(source, identity, plans)
        return _write_set(source, target_location, identity, plans, before, origin, on_progress)


def _write_set(
    source: Directory,
    target_location: Location,
    identity: SetIdentity,
    plans: Sequence[_Plan],
    before: Manifest | None,
    origin: Location | None,
    on_progress: Progress,
) -> Manifest:
    """Write the planned shards, then what describes them; the manifest last.

    Args:
        source: the loose folder.
        target_location: the folder of the set.
        identity: the identity of the set.
        plans: the shards, in order.
        before: the manifest that the plans follow, if there is one.
        origin: the folder that may hold the catalog of a latents set.
        on_progress: called after each shard.
    """
    with open_new_folder(target_location) as target:
        target.publish_bytes(SET_IDENTITY_NAME, identity.to_bytes())
        indices: list[ShardIndex] = []
        for num_done, plan in enumerate(plans, 1):
            indices.append(_write_shard(source, target, plan))
            on_progress(num_done, len(plans))
        is_latents = identity.kind == "latents"
        if is_latents and origin is not None and has_catalog(origin):
            copy_catalog(origin, target_location)
        catalog = 0 if before is None else before.catalog
        left_out = before.undecodable if before and is_latents else ()
        empty = _copy_empty_record(source, target, identity)
        manifest = Manifest.build(identity, catalog, indices, left_out, empty)
        target.publish_bytes(MANIFEST_NAME, manifest.to_bytes())
    return manifest


def _read_identity(source: Directory) -> SetIdentity:
    try:
        return SetFolder(source).identity()
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no {SET_IDENTITY_NAME} next to the loose files",
            expected="a folder that unpack-shards wrote",
            where=source.where(),
            action="files made elsewhere do not say which teacher, text encoders and latents "
            "they came from, and cannot be packed: build the set with build_shards",
        ) from error


def _require_no_strangers(folder: LooseFolder, identity: SetIdentity, source: Directory) -> None:
    strangers = list(folder.strangers)
    if identity.kind != "latents":
        strangers += sorted(folder.sidecars)
    if strangers:
        raise ConfigError(
            f"{len(strangers)} files are not records, the first is {strangers[0]!r}",
            expected="{image_id}_{W}x{H}.safetensors, or …_d{k}.safetensors",
            where=source.where(),
            action="move them elsewhere",
        )


def _follow(identity: SetIdentity, latents: ShardSet, output: Location) -> SetIdentity:
    """Check that the set was made from these latents, and refer to their present location."""
    found = latents.manifest.identity.fingerprint
    reference = identity.latents
    expected = identity.fingerprint if reference is None else reference.fingerprint
    if found != expected:
        raise IncompatibleError(
            f"set {latents.id} has fingerprint {found[:12]}…",
            expected=f"{expected[:12]}…, the latents of set {identity.id}",
            where=str(latents.location),
            action="name the latents set that the records were made from",
        )
    if reference is None:
        return identity
    return replace(identity, latents=SetReference.between(found, output, latents.location))


def _plan_after(latents: ShardSet, identity: SetIdentity, folder: LooseFolder) -> list[_Plan]:
    plans: list[_Plan] = []
    for entry in latents.manifest.shards:
        index = latents.index(entry.name(latents.id))
        source_sha256 = entry.source_sha256 if identity.kind == "latents" else entry.tar_sha256
        for draw in range(folder.num_draws):
            name = ShardName(identity.id, entry.width, entry.height, entry.number, draw)
            records = [
                LooseRecord(entry.width, entry.height, draw, index.image_id(number))
                for number in range(index.num_records)
            ]
            plans.append(_Plan(name, _header(identity, name, source_sha256), records))
    return plans


def _plan_by_catalog(loose: LooseCatalog, identity: SetIdentity) -> list[_Plan]:
    plans: list[_Plan] = []
    for name, entry in zip(loose.manifest.names(), loose.manifest.shards, strict=True):
        records = [
            LooseRecord(name.width, name.height, 0, image_id)
            for image_id in loose.plan.held_ids(name)
        ]
        plans.append(_Plan(name, _header(identity, name, entry.source_sha256), records))
    return plans


def _plan_by_cutting(
    identity: SetIdentity, folder: LooseFolder, records_per_shard: int | None, source: Directory
) -> list[_Plan]:
    if identity.kind != "latents":
        raise ConfigError(
            f"a {identity.kind} set is packed like its latents set, and none is named",
            expected="the folder of the latents set",
            where=source.where(),
            action="add --latents DIR",
        )
    configured = identity.content.get("records_per_shard")
    records_per_shard = records_per_shard or (
        configured if isinstance(configured, int) and configured > 0 else _RECORDS_PER_SHARD
    )
    plans: list[_Plan] = []
    for (width, height), group in groupby(folder.records, key=lambda entry: entry[:2]):
        records = list(group)
        for number, start in enumerate(range(0, len(records), records_per_shard)):
            name = ShardName(identity.id, width, height, number)
            part = records[start : start + records_per_shard]
            plans.append(_Plan(name, _header(identity, name, None), part))
    return plans


def _header(identity: SetIdentity, name: ShardName, source_sha256: str | None) -> RecordHeader:
    return RecordHeader.build(
        identity.schema, name.width, name.height, identity.fingerprint, source_sha256
    )


def _require_same_records(folder: LooseFolder, plans: list[_Plan], source: Directory) -> None:
    planned = {record for plan in plans for record in plan.records}
    missing, extra = planned.difference(folder.records), set(folder.records) - planned
    if missing or extra:
        parts = [
            f"{len(records)} records are {what}, the first is {min(records).file_name}"
            for what, records in (("missing", missing), ("too many", extra))
            if records
        ]
        raise IncompatibleError(
            "; ".join(parts),
            expected=f"the {len(planned)} records of the latents set, in {folder.num_draws} draws",
            where=source.where(),
            action=_UNPACK_AGAIN,
        )


def _require_headers(source: Directory, plans: list[_Plan]) -> None:
    """Check every file's header and size before anything is written."""
    foreign: Counter[str] = Counter()
    for plan in plans:
        for record in plan.records:
            fault = _foreign_header(source, record, plan.header)
            if fault is not None:
                foreign[fault] += 1
    if foreign:
        found = ", ".join(f"{count} records {fault}" for fault, count in sorted(foreign.items()))
        raise IncompatibleError(
            found,
            expected="records of one set, made from today's latents shards",
            where=source.where(),
            action=_UNPACK_AGAIN,
        )


def _require_legal(source: Directory, identity: SetIdentity, plans: list[_Plan]) -> None:
    def load(plan: _Plan) -> ShardLoad:
        sizes: tuple[int, ...] = ()
        if identity.kind == "latents":
            sizes = tuple(_size(source, each.sidecar_name) for each in plan.records)
        return ShardLoad(plan.name.width, plan.name.height, len(plan.records), sizes)

    remedy = Remedy("--records-per-shard", ", and leave --latents out, for the latents")
    require_legal_shards(identity.id, identity.schema, map(load, plans), remedy)


def _size(source: Directory, name: str) -> int:
    """Return the bytes of a file; 0 where there is none, which is reported when it is read."""
    return source.num_bytes(name) or 0


def _foreign_header(source: Directory, record: LooseRecord, header: RecordHeader) -> str | None:
    """Return what is wrong with a record that is not this set's; None when it is.

    Raises:
        CorruptError: when its header is damaged, or the file is truncated.
        IncompatibleError: when it belongs to latents whose catalog is missing.
    """
    where = source.where(record.file_name)
    with source.open(record.file_name) as file:
        # Nearly always size and header are the expected ones, and nothing is parsed.
        num_bytes = file.num_bytes
        is_whole = num_bytes == header.record_bytes
        if is_whole and read_at(file, len(header.content), 0, where) == header.content:
            return None
        longest = min(num_bytes, len(header.content) + MAX_HEADER_BYTES)
        found = RecordHeader.parse(bytes(read_at(file, longest, 0, where)), where)
    # Other bytes: the cause that the user can act on.
    if found.fingerprint != header.fingerprint:
        return f"belong to set {found.fingerprint[:12]}…"
    if header.source_sha256 is None:  # latents to be cut, from a set that had a catalog
        raise IncompatibleError(
            "the records belong to shards that a catalog planned, and the catalog is missing",
            expected="the folder `catalog` next to them, as unpack-shards writes it",
            where=source.where(),
            action="put it back, or unpack the set again",
        )
    if found.source_sha256 != header.source_sha256:
        return "were made from other latents"
    raise CorruptError(
        f"{num_bytes} bytes, or tensors that the set's schema does not have",
        expected=f"{header.record_bytes} bytes",
        where=where,
        action=_UNPACK_AGAIN,
    )


def _write_shard(source: Directory, target: Directory, plan: _Plan) -> ShardIndex:
    name = plan.name
    with target.stage() as staged:
        writer = ShardWriter(staged, name, plan.header)
        for record in plan.records:
            content = source.read(record.file_name, plan.header.record_bytes)
            digest = recreated_noise_digest(plan.header, name, content)
            writer.write(name.key(record.image_id), content, _sidecar(source, plan, record), digest)
        index = writer.close()
        target.publish(staged, name.tar)
    target.publish_bytes(name.idx, index.to_bytes())
    return index


def _sidecar(source: Directory, plan: _Plan, record: LooseRecord) -> bytes | None:
    if "latents" not in {place.name for place in plan.header.places}:  # no others have captions
        return None
    where = source.where(record.sidecar_name)
    try:
        content = source.read(record.sidecar_name, MAX_SIDECAR_BYTES)
    except FileNotFoundError:
        content = b""
    if not content:
        raise CorruptError(
            "is missing or empty", expected="captions", where=where, action=_UNPACK_AGAIN
        )
    return content


def _copy_empty_record(source: Directory, target: Directory, identity: SetIdentity) -> str | None:
    """Copy the empty caption's record of a text set; return its SHA-256."""
    if identity.kind != "text":
        return None
    where = source.where(EMPTY_RECORD_NAME)
    header = RecordHeader.build(identity.schema, 8, 8, identity.fingerprint)
    try:
        content = source.read(EMPTY_RECORD_NAME, header.record_bytes)
    except FileNotFoundError:
        content = b""
    if not content.startswith(header.content) or len(content) != header.record_bytes:
        raise CorruptError(
            "is missing, truncated or from another set", where=where, action=_UNPACK_AGAIN
        )
    target.publish_bytes(EMPTY_RECORD_NAME, content)
    return hashlib.sha256(content).hexdigest()
