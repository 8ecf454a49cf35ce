"""Makes the index of a shard: from its records while they are written, or from the tar itself.

`index_of_tar` reads strictly and trusts nothing but the bytes: a process that finds another's
tar publishes this index, never its own (docs/decisions/0002-create-only-publication.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from sdxl_distill.core.noise import noise
from sdxl_distill.errors import CorruptError
from sdxl_distill.limits import MAX_HEADER_BYTES, MAX_RECORDS, MAX_SHARD_BYTES, MAX_SIDECAR_BYTES
from sdxl_distill.shards.digest import bytes_digest, rest_digest, tensor_digest
from sdxl_distill.shards.index import ShardIndex, is_strictly_ascending, tar_layout
from sdxl_distill.shards.index_layout import ACTION
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.tar import TarMember, TarStream, read_at, read_members
from sdxl_distill.storage.random_access import RandomAccess


class IndexRows:
    """Collects the rows of an index, record by record, while a shard is written or read.

    Args:
        name: the shard's name.
        header: the header that all its records share.
    """

    def __init__(self, name: ShardName, header: RecordHeader) -> None:
        self._name = name
        self._header = header
        self._ids = bytearray()
        self._sidecar_sizes: list[int] = []
        self._digests: list[list[int]] = []
        self._rest_digests: list[int] = []
        self._noise_digests: list[int] = []

    def __len__(self) -> int:
        return len(self._digests)

    def add(
        self, image_id: str, record: bytes | memoryview, sidecar: bytes, noise_digest: int | None
    ) -> None:
        """Append a record's row.

        Args:
            image_id: the image's id, 32 hex digits, greater than the last.
            record: all bytes of the record; the caller has compared its header with the common one.
            sidecar: the bytes of its sidecar; empty where there is none.
            noise_digest: the digest of the noise, where the schema re-creates it; else None.
        """
        assert (noise_digest is not None) == self._header.recreates_noise
        view = memoryview(record)
        places = self._header.places
        self._ids += bytes.fromhex(image_id)
        self._sidecar_sizes.append(len(sidecar))
        self._digests.append(
            [bytes_digest(view[place.offset : place.offset + place.num_bytes]) for place in places]
        )
        self._rest_digests.append(rest_digest(self._header.content, sidecar))
        if noise_digest is not None:
            self._noise_digests.append(noise_digest)

    def index(self, tar_sha256: str) -> ShardIndex:
        """Return the index of the shard that holds exactly the records added.

        Raises:
            CorruptError: when they are not sorted by id, or one was added twice.
        """
        num_records, num_tensors = len(self), len(self._header.places)
        ids = np.reshape(np.frombuffer(bytes(self._ids), np.uint8), (num_records, 16))
        if not is_strictly_ascending(ids):
            raise CorruptError(
                "keys out of order or listed twice",
                expected="keys in ascending order",
                where=self._name.tar,
            )
        sidecar_sizes = np.array(self._sidecar_sizes, np.int64)
        offsets, tar_bytes = tar_layout(self._header.record_bytes, sidecar_sizes)
        digests = np.reshape(np.array(self._digests, np.uint64), (num_records, num_tensors))
        noise_digests = np.array(self._noise_digests, np.uint64)
        return ShardIndex(
            name=self._name,
            header=self._header,
            ids=ids,
            offsets=offsets,
            sizes=np.full(num_records, self._header.record_bytes, np.int64),
            sidecar_sizes=sidecar_sizes,
            digests=digests,
            rest_digests=np.array(self._rest_digests, np.uint64),
            noise_digests=noise_digests if self._header.recreates_noise else None,
            tar_bytes=tar_bytes,
            tar_sha256=tar_sha256,
        )


Look = Callable[[str, memoryview, bytes], None]
"""Called with a record's image id, bytes and sidecar; the bytes are valid during the call only."""


def index_of_tar(
    file: RandomAccess, name: ShardName, header: RecordHeader, look: Look | None = None
) -> ShardIndex:
    """Return the index of a tar: from its bytes alone, except for the header of an empty tar.

    Args:
        file: the tar.
        name: the name that the tar has or will have; its members are checked against it.
        header: the header that its records must have, byte for byte; `header_of_tar` returns the
            one that they have.
        look: a function that sees each record while it is in memory.

    Raises:
        CorruptError: at the first byte that differs from what our writer writes, or when the
            records belong to another set, bucket, draw or source shard.
        StorageError: when the operating system refuses to read.
    """
    _require_legal_size(file, name)
    rows = IndexRows(name, header)
    tar = TarStream(file, name.tar)
    for image_id, member, sidecar in _records(tar.members(), name, header.record_bytes):
        content = b"" if sidecar is None else bytes(tar.read(sidecar.offset, sidecar.num_bytes))
        # Read after its sidecar: reading on may move what was read before.
        record = tar.read(member.offset, member.num_bytes)
        if bytes(record[: len(header.content)]) != header.content:
            raise _corrupt(name, f"{member.name} has another header", _describe(header))
        rows.add(image_id, record, content, recreated_noise_digest(header, name, record))
        if look is not None:
            look(image_id, record, content)
        tar.forget(member.offset + member.num_bytes)
    return rows.index(tar.sha256())


def header_of_tar(file: RandomAccess, name: ShardName) -> RecordHeader | None:
    """Return the header of a tar's first record; None when the tar holds no record.

    Raises:
        CorruptError, StorageError: as `index_of_tar`, but only for the first record.
    """
    _require_legal_size(file, name)
    for _, member, _ in _records(read_members(file, name.tar), name, None):
        num_bytes = min(member.num_bytes, MAX_HEADER_BYTES + 8)
        content = read_at(file, num_bytes, member.offset, name.tar)
        return RecordHeader.parse(bytes(content), f"{name.tar}, {member.name}")
    return None


def recreated_noise_digest(
    header: RecordHeader, name: ShardName, record: bytes | memoryview
) -> int | None:
    """Return the digest of the noise that a record's seed gives; None where noise is stored.

    Raises:
        CorruptError: when the seed is not one that `noise_seed` can give.
    """
    if not header.recreates_noise:
        return None
    place = header.place("seed")
    seed = int.from_bytes(
        record[place.offset : place.offset + place.num_bytes], "little", signed=True
    )
    if not 0 <= seed < 1 << 32:
        raise _corrupt(name, f"seed {seed}", "a whole number of 32 bits")
    num_channels = header.place("teacher_pred").shape[0]
    return tensor_digest(noise(seed, name.width, name.height, num_channels))


def _require_legal_size(file: RandomAccess, name: ShardName) -> None:
    if file.num_bytes > MAX_SHARD_BYTES:
        raise _corrupt(name, f"{file.num_bytes} bytes", f"at most {MAX_SHARD_BYTES}")


def _records(
    members: Iterable[TarMember], name: ShardName, record_bytes: int | None
) -> Iterator[tuple[str, TarMember, TarMember | None]]:
    """Yield image id, record and sidecar: a record's sidecar, if any, follows it directly.

    A member's size is checked before the next member is read, so that no more than a record, a
    sidecar and a header has to be in memory.
    """
    waiting: tuple[str, TarMember] | None = None
    num_records = 0
    for member in members:
        parsed = name.parse_member(member.name)
        if parsed is None:
            raise _corrupt(name, "a member of another bucket, draw or kind", f"{name} records")
        image_id, extension = parsed
        # A sidecar completes the record that waits for it.
        if extension == "json":
            if waiting is None or waiting[0] != image_id:
                raise _corrupt(name, f"{member.name} without its record", "record, then sidecar")
            if not 0 < member.num_bytes <= MAX_SIDECAR_BYTES:
                raise _wrong_size(name, member, f"1 to {MAX_SIDECAR_BYTES}")
            yield (*waiting, member)
            waiting = None
            continue
        # A record: the one before it has no sidecar.
        if record_bytes is not None and member.num_bytes != record_bytes:
            raise _wrong_size(name, member, f"{record_bytes}")
        if waiting is not None:
            yield (*waiting, None)
        waiting = image_id, member
        num_records += 1
        if num_records > MAX_RECORDS:
            raise _corrupt(name, f"more than {MAX_RECORDS} records", f"at most {MAX_RECORDS}")
    if waiting is not None:
        yield (*waiting, None)


def _wrong_size(name: ShardName, member: TarMember, expected: str) -> CorruptError:
    return _corrupt(name, f"{member.name} of {member.num_bytes} bytes", expected)


def _describe(header: RecordHeader) -> str:
    source = header.source_sha256
    made_from = f" made from latents shard {source[:12]}…" if source else ""
    return f"records of set {header.fingerprint[:12]}…{made_from}"


def _corrupt(name: ShardName, found: str, expected: str) -> CorruptError:
    return CorruptError(found, expected=expected, where=name.tar, action=ACTION)
