"""Writes one shard with webdataset.TarWriter into a staged file, hashing on the way."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, Final, cast

from webdataset.writer import TarWriter

from sdxl_distill.core.image_id import parse_record_key
from sdxl_distill.errors import ConfigError, CorruptError
from sdxl_distill.limits import MAX_RECORDS, MAX_SHARD_BYTES, MAX_SIDECAR_BYTES
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.tar import BLOCK_BYTES, MODE, OWNER, closed_bytes, padded, read_members
from sdxl_distill.shards.tar_index import IndexRows
from sdxl_distill.storage.regular_file import storage_errors
from sdxl_distill.storage.staged_file import StagedFile

_PIECE_BYTES: Final = 1 << 19


class ShardWriter:
    """Writes the records of one shard in the order of their keys; memory stays flat.

    ```
    with directory.stage() as tar:
        writer = ShardWriter(tar, name, header)
        for key, tensors in ...:
            writer.write(key, header.encode(tensors))
        index = writer.close()
        directory.publish(tar, name.tar)
    ```
    Without `close` there is no shard: the staged file vanishes.

    Args:
        tar: the empty file to fill; the caller closes it.
        name: the shard's name.
        header: the header that all its records share, from `RecordHeader.build`.
    """

    def __init__(self, tar: StagedFile, name: ShardName, header: RecordHeader) -> None:
        self._staged = tar
        self._file = _HashingFile(tar.file)
        self._name = name
        self._header = header
        self._rows = IndexRows(name, header)
        self._tar = _WholeMembersWriter(
            cast("BinaryIO", self._file), encoder=False, user=OWNER, group=OWNER, mode=MODE, mtime=0
        )

    def write(
        self,
        key: str,
        record: bytes,
        sidecar: bytes | None = None,
        noise_digest: int | None = None,
    ) -> None:
        """Append a record.

        Args:
            key: the record's key, `{image_id}_{W}x{H}`, greater than the last.
            record: the bytes that `RecordHeader.encode` returned for this shard's header.
            sidecar: the content of `{key}.json`, not empty; None where the set has no sidecars.
            noise_digest: the `tensor_digest` of the noise where the schema re-creates it; else
                None.

        Raises:
            StorageError: when the disk is full or refuses.
            ConfigError: when the shard grows beyond 2 GiB or 65,536 records.
        """
        image_id, width, height = parse_record_key(key)
        assert (width, height) == (self._name.width, self._name.height), key
        assert len(record) == self._header.record_bytes, len(record)
        assert record.startswith(self._header.content), key
        assert sidecar is None or 0 < len(sidecar) <= MAX_SIDECAR_BYTES, key
        # Refuse what would make the shard too large.
        room = BLOCK_BYTES + padded(len(record))
        if sidecar is not None:
            room += BLOCK_BYTES + padded(len(sidecar))
        num_bytes = closed_bytes(self._file.num_bytes + room)
        if len(self._rows) == MAX_RECORDS or num_bytes > MAX_SHARD_BYTES:
            raise ConfigError(
                f"a shard of {len(self._rows) + 1} records, {num_bytes} bytes",
                expected=f"at most {MAX_RECORDS} records and {MAX_SHARD_BYTES} bytes",
                where=self._name.tar,
                action="lower data.records_per_shard",
            )
        # Write the members, then their row of the index.
        stem = self._name.member_stem(image_id)
        with storage_errors(self._name.tar):
            self._tar.write({"__key__": stem, "safetensors": record})
            if sidecar is not None:
                self._tar.write({"__key__": stem, "json": sidecar})
        self._rows.add(image_id, record, sidecar or b"", noise_digest)

    def close(self) -> ShardIndex:
        """Finish the tar and return its index, the same that `index_of_tar` finds in it.

        Raises:
            StorageError: when the disk is full or refuses.
            CorruptError: when the tar is not the plain USTAR that it should be.
        """
        with storage_errors(self._name.tar):
            self._tar.close()
            self._file.flush()
        # Read the headers back: the index must be that of the tar.
        index = self._rows.index(self._file.sha256())
        members = list(read_members(self._staged, self._name.tar))
        offsets = [member.offset for member in members if member.name.endswith(".safetensors")]
        if offsets != index.offsets.tolist() or self._file.num_bytes != index.tar_bytes:
            raise CorruptError(
                "webdataset wrote a tar of another form",
                expected="plain USTAR without PAX headers",
                where=self._name.tar,
                action="install the webdataset version of constraints.txt",
            )
        return index


class _WholeMembersWriter(TarWriter):
    """Passes members on whole: cutting them into blocks of 10 KiB copies each byte three times."""

    @staticmethod
    def tarmode(fileobj: Any, compress: bool | str | None = None) -> str:
        del fileobj, compress
        return "w"


class _HashingFile:
    """The few methods that a tar needs of a file, with a SHA-256 on the way.

    Headers, members and padding are collected into pieces, and a thread hashes each piece while
    it is written.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._hashing: Future[None] | None = None
        self._waiting: list[bytes] = []
        self._num_waiting_bytes = 0
        self.num_bytes = 0

    def write(self, content: bytes) -> int:
        self._waiting.append(content)
        self._num_waiting_bytes += len(content)
        self.num_bytes += len(content)
        if self._num_waiting_bytes >= _PIECE_BYTES:
            self._write_piece()
        return len(content)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        self._write_piece()
        self._file.flush()

    def sha256(self) -> str:
        self._wait_for_hash()
        return self._sha256.hexdigest()

    def _write_piece(self) -> None:
        piece = b"".join(self._waiting)
        self._waiting, self._num_waiting_bytes = [], 0
        self._wait_for_hash()
        self._hashing = self._thread.submit(self._sha256.update, piece)
        self._file.write(piece)

    def _wait_for_hash(self) -> None:
        if self._hashing is not None:
            self._hashing.result()
