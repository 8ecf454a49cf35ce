"""Verifies one shard: its index against the manifest, its tar against both, every value.

Nothing is raised but programming errors: what is wrong is collected, and the check goes on as far
as the damage lets it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

from sdxl_distill.errors import CorruptError, DistillError
from sdxl_distill.fsio import Directory
from sdxl_distill.shards.finding import Finding, FindingList
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.index_layout import ACTION, MAX_INDEX_BYTES
from sdxl_distill.shards.reader import ShardReader
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.record_values import RecordPlace, check_sidecar, wrong_values
from sdxl_distill.shards.set_record import SetRecord
from sdxl_distill.shards.shard_entry import ShardEntry
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.tar_index import header_of_tar, index_of_tar


@dataclass(frozen=True)
class CheckedShard:
    """What became of one shard.

    Attributes:
        name: of the shard.
        index: stored, or when that is damaged that of the tar; None when neither can be read.
        findings: what is wrong; empty for a good shard.
    """

    name: ShardName
    index: ShardIndex | None
    findings: list[Finding]


def check_shard(
    directory: Directory,
    record: SetRecord,
    name: ShardName,
    entry: ShardEntry | None,
    *,
    quick: bool,
) -> CheckedShard:
    """Verify one shard of a set.

    Args:
        directory: of the set.
        record: of the set.
        name: of the shard.
        entry: what the manifest says of it; None in a set without a manifest.
        quick: look at the index and at the size of the tar only.
    """
    return _ShardCheck(directory, record, name, entry).run(quick=quick)


class _ShardCheck:
    def __init__(
        self, directory: Directory, record: SetRecord, name: ShardName, entry: ShardEntry | None
    ) -> None:
        self._directory = directory
        self._record = record
        self._name = name
        self._entry = entry
        self._findings = FindingList(record.id, name.tar)

    def run(self, *, quick: bool) -> CheckedShard:
        stored = self._stored_index()
        index = stored
        with self._findings.collecting(), os.fdopen(self._open(), "rb") as tar:
            has_size = self._has_expected_size(tar.fileno(), stored)
            if not quick:
                computed = self._computed_index(tar.fileno(), stored) if has_size else None
                index = stored or computed
                num_findings = len(self._findings)
                if index is not None:
                    self._check_records(tar.fileno(), index)
                if len(self._findings) == num_findings:
                    self._compare(stored, computed)
        return CheckedShard(self._name, index, self._findings.all())

    def _open(self) -> int:
        return self._found(lambda: self._directory.open(self._name.tar), "the tar is missing")

    def _stored_index(self) -> ShardIndex | None:
        """Return the index file's content when it is good and of this set."""
        with self._findings.collecting():
            content = _present(self._directory, self._name.idx)
            index = ShardIndex.from_bytes(content, self._name)
            self._require_header(index)
            self._require_entry(index)
            return index
        return None

    def _require_header(self, index: ShardIndex) -> None:
        if index.header.content != self._header(index.header.source_sha256).content:
            raise CorruptError(
                f"the index is one of records of set {index.header.fingerprint[:12]}…",
                expected=f"records of set {self._record.fingerprint[:12]}…, its schema and source",
                action=ACTION,
            )

    def _require_entry(self, index: ShardIndex) -> None:
        found = ShardEntry.of(index)
        if self._entry is not None and found != self._entry:
            fields = [
                field
                for field, left, right in zip(found._fields, found, self._entry, strict=True)
                if left != right
            ]
            raise CorruptError(
                f"the index differs from the manifest in {', '.join(fields)}",
                expected="the shard that the manifest lists",
                action=ACTION,
            )
