"""The manifest that is in a set's folder, and whether the files that it names are there.

Workers that wait for the finisher ask every second, and a manifest of 10⁵ shards takes a second
to parse: it is parsed again only when it is another file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final

from sdxl_distill.builder.commit import REPAIR, naming_repair
from sdxl_distill.builder.in_place import require_in_place
from sdxl_distill.errors import CorruptError
from sdxl_distill.limits import MAX_MANIFEST_BYTES
from sdxl_distill.runtime.ordered_map import ordered_map
from sdxl_distill.shards.index_layout import index_bytes
from sdxl_distill.shards.manifest import MANIFEST_NAME, Manifest, ShardEntry
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.shards.shard_set import EMPTY_RECORD_NAME
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.regular_file import storage_errors

_NUM_THREADS: Final = 8
_ENTRIES_AT_ONCE: Final = 512

_Status = tuple[int, int, int, int]


class ExistingManifest:
    """The manifest in a folder, read again only when it has changed.

    Args:
        directory: of the set.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._status: _Status | None = None
        self._manifest: Manifest | None = None

    def read(self) -> Manifest | None:
        """Return the manifest; None when there is none, or a damaged one.

        A damaged one counts as none, since the indices tell all that it should say.

        Raises:
            CorruptError: when it is not a regular file, or absurdly large; names `--repair`.
            StorageError: when it cannot be read.
        """
        where = str(self._directory.path / MANIFEST_NAME)
        status = self._look(where)
        if status is not None and status == self._status:
            return self._manifest
        self._status = self._manifest = None
        with suppress(FileNotFoundError), naming_repair(where):
            content = self._directory.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
            self._manifest = parse_manifest(self._directory, content)
            # Taken before the content was: a newer file is read once more, never an older one.
            self._status = status
        return self._manifest

    def _look(self, where: str) -> _Status | None:
        """Return what no two contents of the name share: it is never written in place."""
        with storage_errors(where), suppress(FileNotFoundError):
            found = os.stat(MANIFEST_NAME, dir_fd=self._directory.descriptor)
            return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
        return None


def parse_manifest(directory: Directory, content: bytes) -> Manifest | None:
    """Read a manifest; None for a damaged one."""
    with suppress(CorruptError):
        return Manifest.from_bytes(content, str(directory.path / MANIFEST_NAME))
    return None


def require_files(directory: Directory, manifest: Manifest) -> None:
    """Check by names and sizes that the committed shards of a complete set are still there.

    What costs no reading; `verify-shards` and readers find the rest. A shard without an index is
    none of those: it is built, or its tar adopted.

    Raises:
        CorruptError: naming the first shard that is not there or was cut, how many there are, and
            `--repair`.
        StorageError: when the operating system refuses, or the set was withdrawn meanwhile.
    """
    identity, names = manifest.identity, directory.names()
    wrong: list[tuple[str, str]] = []
    if identity.kind == "text" and EMPTY_RECORD_NAME not in names:
        wrong.append((EMPTY_RECORD_NAME, "is missing"))
    committed = [each for each in manifest.shards if each.name(identity.id).idx in names]
    pieces = [
        committed[start : start + _ENTRIES_AT_ONCE]
        for start in range(0, len(committed), _ENTRIES_AT_ONCE)
    ]

    def look(entries: Sequence[ShardEntry]) -> list[tuple[str, str]]:
        return list(_wrong_files(directory, identity, entries))

    for found in ordered_map(look, pieces, _NUM_THREADS, "look"):
        wrong += found
    if wrong:
        require_in_place(directory)
        name, what = wrong[0]
        others = f"; {len(wrong) - 1} other files are missing or changed" if len(wrong) > 1 else ""
        raise CorruptError(
            f"the set was complete, but a file of it {what}{others}",
            expected="the files that the manifest names",
            where=str(directory.path / name),
            action=REPAIR,
        )


def _wrong_files(
    directory: Directory, identity: SetIdentity, entries: Sequence[ShardEntry]
) -> Iterator[tuple[str, str]]:
    headers: dict[tuple[int, int], RecordHeader] = {}  # of one size, whatever the source
    for entry in entries:
        name, bucket = entry.name(identity.id), entry[:2]
        if bucket not in headers:
            headers[bucket] = RecordHeader.build(
                identity.schema, *bucket, identity.fingerprint, entry.source_sha256
            )
        header = headers[bucket]
        expected = index_bytes(
            entry.num_records,
            entry.tar_bytes,
            len(header.content),
            len(header.places),
            has_noise=header.recreates_noise,
        )
        for file_name, num_bytes in ((name.tar, entry.tar_bytes), (name.idx, expected)):
            what = _wrong_file(directory, file_name, num_bytes)
            if what is not None:
                yield file_name, what


def _wrong_file(directory: Directory, name: str, num_bytes: int) -> str | None:
    with storage_errors(directory.path / name):
        try:
            found = os.stat(name, dir_fd=directory.descriptor)
        except FileNotFoundError:
            return "is missing"
    if not stat.S_ISREG(found.st_mode):
        return "is not a regular file"
    if found.st_size != num_bytes:
        return f"has {found.st_size} bytes instead of {num_bytes}"
    return None
