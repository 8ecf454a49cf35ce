"""The manifest in a set's folder, and whether the files that it names exist.

Workers that wait for the finisher ask every second, and a manifest of 10⁵ shards takes a second
to parse: it is parsed again only when the file has changed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from typing import Final

from sdxl_distill.builder.commit import REPAIR, naming_repair
from sdxl_distill.builder.in_place import require_in_place
from sdxl_distill.errors import CorruptError
from sdxl_distill.runtime.ordered_map import ordered_map
from sdxl_distill.shards.index_layout import index_bytes
from sdxl_distill.shards.manifest import MANIFEST_NAME, Manifest, ShardEntry
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.set_folder import EMPTY_RECORD_NAME, SetFolder
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.storage.fsio import Directory

_NUM_THREADS: Final = 8
_ENTRIES_AT_ONCE: Final = 512


class ExistingManifest:
    """The manifest in a folder, read again only when it has changed.

    Args:
        folder: the set's folder.
    """

    def __init__(self, folder: SetFolder[Directory]) -> None:
        self._folder = folder
        self._version: Hashable = None
        self._manifest: Manifest | None = None

    def read(self) -> Manifest | None:
        """Return the manifest; None when there is none, or a damaged one.

        A damaged one counts as none, since all that it should say follows from the indices.

        Raises:
            CorruptError: when it is not a regular file, or absurdly large; names `--repair`.
            StorageError: when it cannot be read.
        """
        where = self._folder.where(MANIFEST_NAME)
        version = self._folder.folder.version(MANIFEST_NAME)
        if version is not None and version == self._version:
            return self._manifest
        self._version = self._manifest = None
        with suppress(FileNotFoundError), naming_repair(where):
            self._manifest = parse_manifest(self._folder.manifest_bytes(), where)
            # Taken before the content: a newer file may be read twice, but none is missed.
            self._version = version
        return self._manifest


def parse_manifest(content: bytes, where: str) -> Manifest | None:
    """Read a manifest; None for a damaged one."""
    with suppress(CorruptError):
        return Manifest.from_bytes(content, where)
    return None


def require_files(directory: Directory, manifest: Manifest) -> None:
    """Check by names and sizes that the committed shards of a complete set still exist.

    This reads no content; `verify-shards` and readers find the rest. A shard without an index is
    not committed: it is built, or its tar adopted.

    Raises:
        CorruptError: naming the first file that is missing or has another size, the number of
            others, and `--repair`.
        StorageError: when the operating system refuses, or the set was withdrawn meanwhile.
    """
    # Names first: a listing tells most, and which shards are committed.
    identity, names = manifest.identity, directory.names()
    wrong: list[tuple[str, str]] = []
    if identity.kind == "text" and EMPTY_RECORD_NAME not in names:
        wrong.append((EMPTY_RECORD_NAME, "is missing"))
    committed = [each for each in manifest.shards if each.name(identity.id).idx in names]
    # Sizes, in threads: over a network each takes a round trip.
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
            f"the set was complete, but one of its files {what}{others}",
            expected="the files that the manifest names",
            where=directory.where(name),
            action=REPAIR,
        )


def _wrong_files(
    directory: Directory, identity: SetIdentity, entries: Sequence[ShardEntry]
) -> Iterator[tuple[str, str]]:
    headers: dict[tuple[int, int], RecordHeader] = {}  # one for each bucket, whatever the source
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
    try:
        found = directory.num_bytes(name)
    except CorruptError as error:
        return error.found
    if found is None:
        return "is missing"
    return None if found == num_bytes else f"has {found} bytes instead of {num_bytes}"
