"""Verifies one shard: its index against the manifest, its tar against both, and every value.

Faults are collected, not raised, and the check goes on as far as the damage lets it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from sdxl_distill.errors import CorruptError, DistillError
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.index_layout import ACTION
from sdxl_distill.shards.manifest import ShardEntry
from sdxl_distill.shards.reader import ShardReader
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.set_folder import SetFolder
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.sidecar import parse_captions
from sdxl_distill.shards.tar_index import header_of_tar, index_of_tar
from sdxl_distill.storage.folder import Folder
from sdxl_distill.storage.random_access import RandomAccess
from sdxl_distill.verify.finding import Finding, FindingList
from sdxl_distill.verify.record_values import RecordPlace, wrong_values


@dataclass(frozen=True)
class CheckedShard:
    """The result of the check of one shard.

    Attributes:
        name: the shard's name.
        index: the stored index, or the tar's where that is damaged; None when neither can be read.
        findings: the faults of the shard; empty for a good one.
    """

    name: ShardName
    index: ShardIndex | None
    findings: list[Finding]


def check_shard(
    folder: SetFolder[Folder],
    identity: SetIdentity,
    name: ShardName,
    entry: ShardEntry | None,
    *,
    quick: bool,
) -> CheckedShard:
    """Verify one shard of a set.

    Args:
        folder: the set's folder.
        identity: the identity of the set.
        name: the shard's name.
        entry: the manifest's entry for it; None where there is no manifest.
        quick: True to look only at the index and at the size of the tar.
    """
    findings = FindingList(identity.id, name.tar)
    stored: ShardIndex | None = None
    with findings.collecting():
        stored = _stored_index(folder, identity, name, entry)
    index = stored
    with findings.collecting():
        tar = _open_tar(folder, name)
        _require_size(tar, entry, stored)
        if not quick:
            index = _check_content(tar, identity, name, entry, stored, findings)
    return CheckedShard(name, index, findings.all())


def existing_index(
    folder: SetFolder[Folder], identity: SetIdentity, name: ShardName
) -> ShardIndex | None:
    """Return the index of a shard again, the tar's where it is damaged; None without either."""
    try:
        return _stored_index(folder, identity, name, None)
    except DistillError:
        pass
    try:
        tar = _open_tar(folder, name)
        return index_of_tar(
            tar, name, _header(identity, name, _source_sha256(tar, name, None, None))
        )
    except DistillError:
        return None


def _stored_index(
    folder: SetFolder[Folder], identity: SetIdentity, name: ShardName, entry: ShardEntry | None
) -> ShardIndex:
    try:
        index = folder.index(name)
    except FileNotFoundError as error:
        raise CorruptError("the index is missing", expected=name.idx, action=ACTION) from error
    if index.header.content != _header(identity, name, index.header.source_sha256).content:
        raise CorruptError(
            f"the index lists records of set {index.header.fingerprint[:12]}…",
            expected=f"records of set {identity.fingerprint[:12]}… with its schema",
            action=ACTION,
        )
    found = ShardEntry.of(index)
    if entry is not None and found != entry:
        pairs = zip(found._fields, found, entry, strict=True)
        fields = ", ".join(field for field, left, right in pairs if left != right)
        raise CorruptError(
            f"the index differs from the manifest in {fields}",
            expected="the shard that the manifest lists",
            action=ACTION,
        )
    return index


def _open_tar(folder: SetFolder[Folder], name: ShardName) -> RandomAccess:
    try:
        return folder.tar(name)
    except FileNotFoundError as error:
        raise CorruptError("the tar is missing", expected=name.tar, action=ACTION) from error


def _require_size(tar: RandomAccess, entry: ShardEntry | None, stored: ShardIndex | None) -> None:
    """Compare sizes, so that a tar that was cut need not be read."""
    known = entry or stored
    if known is not None and tar.num_bytes != known.tar_bytes:
        raise CorruptError(
            f"the tar has {tar.num_bytes} bytes", expected=f"{known.tar_bytes}", action=ACTION
        )


def _check_content(
    tar: RandomAccess,
    identity: SetIdentity,
    name: ShardName,
    entry: ShardEntry | None,
    stored: ShardIndex | None,
    findings: FindingList,
) -> ShardIndex | None:
    """Read the tar strictly, and record by record through the index where it is damaged.

    Returns:
        The index that counts; None when there is none.
    """
    # Strictly, from start to end: this gives the tar's own index.
    computed: ShardIndex | None = None
    wrong: list[tuple[str, CorruptError]] = []
    with findings.collecting():
        source = _source_sha256(tar, name, entry, stored)
        header = _header(identity, name, source)

        def look(image_id: str, content: memoryview, sidecar: bytes) -> None:
            errors = _wrong_content(identity, name, image_id, header.decode(content), sidecar)
            wrong.extend((name.key(image_id), error) for error in errors)

        computed = index_of_tar(tar, name, header, look)
    index = stored or computed
    if index is None:
        return None
    if computed is not None and computed.digest == index.digest:
        for key, error in wrong:
            findings.add(error, key)
        return index
    # Something is damaged: the index tells which records.
    num_before = len(findings)
    _check_records(tar, identity, index, findings)
    is_explained = len(findings) > num_before
    if computed is not None and not is_explained:
        findings.add(
            CorruptError(
                f"the index is not that of the tar, whose SHA-256 is {computed.tar_sha256[:12]}…",
                expected=f"{index.tar_sha256[:12]}…",
                action=ACTION,
            )
        )
    return index


def _check_records(
    tar: RandomAccess, identity: SetIdentity, index: ShardIndex, findings: FindingList
) -> None:
    reader = ShardReader(tar, index, diagnose=lambda error: error)
    for number in range(index.num_records):
        key, image_id = index.key(number), index.image_id(number)
        with findings.collecting(key):
            tensors, sidecar = reader.read_record(number), reader.read_sidecar(number)
            for error in _wrong_content(identity, index.name, image_id, tensors, sidecar):
                findings.add(error, key)


def _wrong_content(
    identity: SetIdentity,
    name: ShardName,
    image_id: str,
    tensors: Mapping[str, torch.Tensor],
    sidecar: bytes,
) -> Iterator[CorruptError]:
    """Yield what is wrong with a record whose bytes match its digests."""
    place = RecordPlace(image_id, name.width, name.height, name.draw)
    yield from wrong_values(tensors, place, identity.noise, ACTION)
    if identity.kind == "latents":
        try:
            parse_captions(sidecar, ACTION)
        except CorruptError as error:
            yield error


def _source_sha256(
    tar: RandomAccess, name: ShardName, entry: ShardEntry | None, stored: ShardIndex | None
) -> str | None:
    if entry is not None:
        return entry.source_sha256
    header = stored.header if stored is not None else header_of_tar(tar, name)
    return None if header is None else header.source_sha256


def _header(identity: SetIdentity, name: ShardName, source_sha256: str | None) -> RecordHeader:
    return RecordHeader.build(
        identity.schema, name.width, name.height, identity.fingerprint, source_sha256
    )
