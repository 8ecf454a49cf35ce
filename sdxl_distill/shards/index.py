"""The index of one shard: where each record lies in the tar, and a digest of every part of it.

It is a pure function of the tar's bytes (tar_index.py), and only what `ShardIndex.to_bytes`
would write is accepted back. See docs/format.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from sdxl_distill.core.image_id import ids_digest
from sdxl_distill.errors import CorruptError
from sdxl_distill.limits import MAX_SIDECAR_BYTES
from sdxl_distill.shards.index_layout import (
    ACTION,
    encode_index,
    known_index,
    own_digest,
    parse_index,
)
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.tar import (
    BLOCK_BYTES,
    closed_bytes,
    padded,
)

_NO_DIGEST: Final = "0" * 64

UInt64: TypeAlias = npt.NDArray[np.uint64]
Int64: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What is known about a shard of n records with T tensors each, without opening its tar.

    Attributes:
        name: the shard's name; not stored, since the file's name gives it.
        header: the header that all records share; the columns of tensors are in its order.
        ids: uint8 [n, 16], the image ids, strictly ascending.
        offsets: int64 [n], the byte in the tar at which each record's header begins.
        sizes: int64 [n], the size of each record in bytes, header included.
        sidecar_sizes: int64 [n], the size of each `{key}.json` in bytes; 0 where there is none.
        digests: uint64 [n, T], the xxh3 of each tensor's bytes.
        rest_digests: uint64 [n], the xxh3 of each record's header and sidecar.
        noise_digests: uint64 [n], the xxh3 of the noise that each seed gives where noise is not
            stored (layout `compact`); else None.
        tar_bytes: the size of the tar.
        tar_sha256: the SHA-256 of the tar, 64 hex digits.
    """

    name: ShardName
    header: RecordHeader
    ids: npt.NDArray[np.uint8]
    offsets: Int64
    sizes: Int64
    sidecar_sizes: Int64
    digests: UInt64
    rest_digests: UInt64
    noise_digests: UInt64 | None
    tar_bytes: int
    tar_sha256: str

    @property
    def num_records(self) -> int:
        """How many records the shard holds; may be 0."""
        return len(self.ids)

    @cached_property
    def keys_digest(self) -> str:
        """SHA-256 of the ids: equal in two shards of one bucket ⇔ same keys, same order."""
        return ids_digest(self.ids)

    @cached_property
    def digest(self) -> str:
        """The index's own digest: SHA-256 of the file with 64 zeros in the digest's place."""
        return hashlib.sha256(self._encode(_NO_DIGEST)).hexdigest()

    def image_id(self, record: int) -> str:
        """Return the image id of a record, 32 hex digits."""
        return self.ids[record].tobytes().hex()

    def key(self, record: int) -> str:
        """Return the key of a record."""
        return self.name.key(self.image_id(record))

    def keys(self) -> list[str]:
        """Return all keys in the order of the records."""
        return [self.key(record) for record in range(self.num_records)]

    def tensor_digests(self, tensor_name: str) -> UInt64:
        """Return uint64 [n]: the digest of one tensor in each record.

        `noise` can be asked for in both layouts, stored or not; KeyError for unknown names.
        """
        if tensor_name == "noise" and self.noise_digests is not None:
            return self.noise_digests
        return self.digests[:, self.header.column(tensor_name)]

    def tensor_digest(self, tensor_name: str, record: int) -> int:
        """Return the digest of one tensor in one record; otherwise as `tensor_digests`."""
        if tensor_name == "noise" and self.noise_digests is not None:
            return int(self.noise_digests[record])
        return int(self.digests[record, self.header.column(tensor_name)])

    def sidecar_offset(self, record: int) -> int:
        """Return where the record's sidecar begins in the tar, if it has one."""
        return int(self.offsets[record]) + padded(int(self.sizes[record])) + BLOCK_BYTES

    def to_bytes(self) -> bytes:
        """Return the content of the `.idx` file."""
        return self._encode(self.digest)

    def _encode(self, digest: str) -> bytes:
        tensors = {
            "common_header": np.frombuffer(self.header.content, np.uint8),
            "ids": self.ids,
            "offsets": self.offsets,
            "sizes": self.sizes,
            "sidecar_sizes": self.sidecar_sizes,
            "digests": self.digests,
            "rest_digests": self.rest_digests,
        }
        if self.noise_digests is not None:
            tensors["noise_digests"] = self.noise_digests
        metadata = {
            "digest": digest,
            "fingerprint": self.header.fingerprint,
            "num_records": str(self.num_records),
            "tar_bytes": str(self.tar_bytes),
            "tar_sha256": self.tar_sha256,
        }
        return encode_index(tensors, metadata)

    @classmethod
    def from_bytes(cls, content: bytes, name: ShardName) -> ShardIndex:
        """Read the content of the `.idx` file of shard `name`.

        Raises:
            CorruptError: when anything differs from what `to_bytes` writes: names, dtypes,
                shapes, the order of the keys, offsets, the index's own digest.
            IncompatibleError: when a newer version wrote it.
        """
        metadata, tensors = parse_index(content, name.idx)
        common_header = tensors["common_header"].tobytes()
        header = RecordHeader.parse(common_header, name.idx)
        index = cls._of(tensors, metadata, name, header)
        index._check()
        if (
            own_digest(content) != metadata["digest"]
            or metadata["fingerprint"] != header.fingerprint
            or common_header != header.content
        ):
            raise _corrupt(
                name,
                "the bytes do not match the digest, the fingerprint or the header in them",
                "the file as it was written",
            )
        return index

    @classmethod
    def from_known_bytes(
        cls,
        content: bytes,
        name: ShardName,
        header: RecordHeader,
        *,
        digest: str,
        num_records: int,
        tar_bytes: int,
        tar_sha256: str,
    ) -> ShardIndex | None:
        """Read the content of an `.idx` file of which all but the records' rows is known.

        Takes a fifth of the time of `from_bytes`; where this returns None, that says what is wrong.

        Args:
            content: the bytes of the file.
            name: the shard's name.
            header: the header that its records have.
            digest: the index's own digest, 64 hex digits.
            num_records: the number of the shard's records.
            tar_bytes: the size of the tar.
            tar_sha256: the SHA-256 of the tar, 64 hex digits.

        Raises:
            CorruptError: when the rows contradict each other, whatever the digest says.
        """
        metadata = {
            "digest": digest,
            "fingerprint": header.fingerprint,
            "num_records": str(num_records),
            "tar_bytes": str(tar_bytes),
            "tar_sha256": tar_sha256,
        }
        # Compares sizes and metadata only: a file that looks different is for `from_bytes`.
        tensors = known_index(
            content,
            metadata,
            len(header.content),
            len(header.places),
            has_noise=header.recreates_noise,
        )
        if (
            tensors is None
            or own_digest(content) != digest
            or tensors["common_header"].tobytes() != header.content
        ):
            return None
        index = cls._of(tensors, metadata, name, header)
        index._check()
        return index

    @classmethod
    def _of(
        cls,
        tensors: Mapping[str, npt.NDArray[Any]],
        metadata: Mapping[str, str],
        name: ShardName,
        header: RecordHeader,
    ) -> ShardIndex:
        index = cls(
            name=name,
            header=header,
            ids=tensors["ids"],
            offsets=tensors["offsets"],
            sizes=tensors["sizes"],
            sidecar_sizes=tensors["sidecar_sizes"],
            digests=tensors["digests"],
            rest_digests=tensors["rest_digests"],
            noise_digests=tensors.get("noise_digests"),
            tar_bytes=int(metadata["tar_bytes"]),
            tar_sha256=metadata["tar_sha256"],
        )
        # What `digest` would compute: the file is compared with it before a caller gets the index.
        vars(index)["digest"] = metadata["digest"]
        return index

    def _check(self) -> None:
        sidecars = self.sidecar_sizes
        illegal = sidecars[(sidecars < 0) | (sidecars > MAX_SIDECAR_BYTES)]
        if illegal.size:
            found = f"a sidecar of {illegal[0]} bytes"
            raise _corrupt(self.name, found, f"0 to {MAX_SIDECAR_BYTES} bytes")
        offsets, tar_bytes = tar_layout(self.header.record_bytes, sidecars)
        if (
            (self.sizes != self.header.record_bytes).any()
            or (self.offsets != offsets).any()
            or self.tar_bytes != tar_bytes
        ):
            raise _corrupt(self.name, "wrong sizes or offsets", "those that follow from the header")
        if self.digests.shape[1] != len(self.header.places):
            found = f"digests of {self.digests.shape[1]} tensors"
            raise _corrupt(self.name, found, f"the {len(self.header.places)} of the common header")
        if (self.noise_digests is not None) != self.header.recreates_noise:
            raise _corrupt(
                self.name,
                "noise digests are missing, or stand next to stored noise",
                "digests of the noise exactly where records hold a seed in its place",
            )
        if not is_strictly_ascending(self.ids):
            raise _corrupt(
                self.name, "keys out of order or listed twice", "keys in ascending order"
            )


def tar_layout(record_bytes: int, sidecar_sizes: Int64) -> tuple[Int64, int]:
    """Return where each record of a shard begins, int64 [n], and the size of its tar."""
    sidecar_room = np.where(sidecar_sizes > 0, BLOCK_BYTES + _padded(sidecar_sizes), 0)
    room = BLOCK_BYTES + padded(record_bytes) + sidecar_room
    ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), room]))
    return ends[:-1] + BLOCK_BYTES, closed_bytes(int(ends[-1]))


def is_strictly_ascending(ids: npt.NDArray[np.uint8]) -> bool:
    """Whether ids, uint8 [n, 16], are sorted and all different."""
    keys = np.frombuffer(ids.tobytes(), np.dtype("S16"))
    return bool(np.all(keys[:-1] < keys[1:]))


def _padded(sizes: Int64) -> Int64:
    return sizes + -sizes % BLOCK_BYTES


def _corrupt(name: ShardName, found: str, expected: str) -> CorruptError:
    return CorruptError(found, expected=expected, where=name.idx, action=ACTION)
